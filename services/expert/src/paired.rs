//! A grouped FFN of batches of which some have their rows on a caller's board: sums are added up on the device, and left there
//! for who has a pair. Others get them in their answers, as ever.

use conclave_dispatch::ModelShape;
use conclave_kernels::cell_tree::{self, Levels, Node};
use conclave_kernels::{Device, ExpertRows, GroupedSums, KernelError, RowsAt, SumsAt, Wanted};
use conclave_proto::v1::{ExpertBatch, PartialSum};

use crate::merge::{Input, NONE, Sums, position};

/// The sums of one batch, and where each lies in the end.
struct Plan {
    parts: Vec<PartialSum>,
    slots: Vec<u32>,
}

/// Runs batches with the leaves of each: the slot of each row and group. `slots`: how many there are.
///
/// # Errors
/// When the device has failed.
pub(crate) fn run<D: Device>(
    device: &D,
    shape: &ModelShape,
    batches: &[(Input<'_, D>, &[u32])],
    experts: &[ExpertRows<'_, D::Matrix>],
    slots: usize,
) -> Result<Vec<Sums>, KernelError> {
    let mut levels = Levels::new();
    let plans: Vec<Plan> =
        batches.iter().map(|(input, leaves)| plan(shape.groups, input.batch, leaves, &mut levels)).collect();
    let x: Vec<RowsAt<'_, D::Shared>> = batches.iter().map(|(input, _)| rows(input)).collect();
    let row_bytes = shape.hidden * device.activation().size();
    let mut on_host: Vec<Vec<u8>> = vec![Vec::new(); batches.len()];
    let mut wanted = Vec::with_capacity(batches.len());
    for (((input, _), plan), bytes) in batches.iter().zip(&plans).zip(&mut on_host) {
        let pair =
            input.pair.filter(|pair| !input.batch.board_rows.is_empty() && pair.fits(plan.slots.len() * row_bytes));
        let to = pair.map_or(SumsAt::Host(bytes), |pair| SumsAt::Shared(&*pair.sums));
        wanted.push(Wanted { slots: &plan.slots, to });
    }
    let in_pair: Vec<bool> = wanted.iter().map(|sums| matches!(sums.to, SumsAt::Shared(_))).collect();
    device.grouped_sums(&GroupedSums { x: &x, experts, slots, levels: &levels }, &mut wanted)?;
    let each = plans.into_iter().zip(on_host).zip(in_pair);
    Ok(each.map(|((plan, bytes), in_pair)| sums(plan, bytes, in_pair, row_bytes)).collect())
}

fn rows<'a, D: Device>(input: &Input<'a, D>) -> RowsAt<'a, D::Shared> {
    match input.pair.filter(|_| !input.batch.board_rows.is_empty()) {
        Some(pair) => RowsAt::Shared(&pair.board, &input.batch.board_rows),
        None => RowsAt::Host(&input.batch.x),
    }
}

/// One sum per maximal subtree of the batch's groups and row with an expert in it.
fn plan(groups: usize, batch: &ExpertBatch, leaves: &[u32], levels: &mut Levels) -> Plan {
    let held: Vec<usize> = batch.groups.iter().map(|group| *group as usize).collect();
    let mut plan = Plan { parts: Vec::new(), slots: Vec::new() };
    for node in cell_tree::maximal_nodes(groups, &held) {
        let Node { first, last } = node;
        let columns = position(&batch.groups, first as u32)..position(&batch.groups, last as u32);
        let mut row_index = Vec::new();
        for (row, slots) in leaves.chunks(held.len()).take(batch.rows as usize).enumerate() {
            let filled = columns.clone().filter(|column| slots[*column] != NONE);
            let parts: Vec<(usize, u32)> = filled.map(|column| (held[column], slots[column])).collect();
            if let Some(slot) = cell_tree::slot_sum(node, &parts, levels) {
                row_index.push(row as u32);
                plan.slots.push(slot);
            }
        }
        if !row_index.is_empty() {
            let (first, last) = (first as u32, last as u32);
            plan.parts.push(PartialSum { first, last, row_index, ..PartialSum::default() });
        }
    }
    plan
}

fn sums(mut plan: Plan, bytes: Vec<u8>, in_pair: bool, row_bytes: usize) -> Sums {
    if !in_pair {
        let mut bytes = bytes::Bytes::from(bytes);
        for part in &mut plan.parts {
            part.sum = bytes.split_to(part.row_index.len() * row_bytes);
        }
    }
    Sums { parts: plan.parts, in_pair }
}
