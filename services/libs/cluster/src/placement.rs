//! Which cells an expert process takes: a pure rule, applied within the transaction that claims them.

use std::collections::{BTreeMap, BTreeSet};

use conclave_proto::{CellId, GroupId};

use crate::choice::GroupRange;
use crate::{CellChoice, ClusterError, ClusterView, MemberState, Role};

/// The cells of a model: every group over every span of MoE layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellShape {
    /// Expert groups.
    pub groups: u32,
    /// Spans of MoE layers; 1 where a cell covers all of them.
    pub spans: u32,
}

/// Busy time per cell over a recent while, in any one unit; absent is none.
pub type Loads = BTreeMap<CellId, f64>;

impl CellShape {
    /// How many cells the model has.
    pub fn count(self) -> u64 {
        u64::from(self.groups) * u64::from(self.spans)
    }

    /// All cells, ascending.
    pub fn cells(self) -> impl Iterator<Item = CellId> {
        (0..self.spans).flat_map(move |span| (0..self.groups).map(move |group| CellId { span, group: GroupId(group) }))
    }
}

/// The cells that `choice` means for a process that joins `view`, ascending.
///
/// `auto` takes the cells with the fewest replicas (loading or ready) first, among them the most loaded, then the lowest;
/// so processes that join one after another, each seeing the ones before it, cover all cells evenly. Members of another
/// checkpoint are no replicas: pass [`ClusterView::of_checkpoint`]. `fits` is the number of cells that fit in memory.
///
/// # Errors
/// [`ClusterError::Placement`] when a cell does not exist, a shard would be empty, or the cells do not fit.
pub fn choose(
    choice: &CellChoice,
    shape: CellShape,
    view: &ClusterView,
    loads: &Loads,
    fits: usize,
) -> Result<Vec<CellId>, ClusterError> {
    let chosen = match choice {
        CellChoice::Listed(ranges) => listed(ranges, shape)?,
        CellChoice::Shard { index, of } => shard(*index, *of, shape)?,
        CellChoice::Auto(count) => {
            let count = auto_count(*count, shape, fits)?;
            neediest(shape, view, loads).into_iter().take(count).collect()
        }
    };
    if chosen.len() > fits {
        let found = chosen.len();
        return Err(ClusterError::Placement(format!("cells {choice}: {found} cells, but {fits} fit in memory")));
    }
    Ok(chosen.into_iter().collect())
}

fn listed(ranges: &[GroupRange], shape: CellShape) -> Result<BTreeSet<CellId>, ClusterError> {
    let mut cells = BTreeSet::new();
    for range in ranges {
        check(*range, shape)?;
        let spans = range.span.map_or(0..shape.spans, |span| span..span + 1);
        cells.extend(
            spans.flat_map(|span| (range.first..=range.last).map(move |group| CellId { span, group: GroupId(group) })),
        );
    }
    Ok(cells)
}

fn check(range: GroupRange, shape: CellShape) -> Result<(), ClusterError> {
    if range.last >= shape.groups {
        let (last, groups) = (range.last, shape.groups);
        return Err(ClusterError::Placement(format!("cell {last}: the model has {groups} groups, counted from 0")));
    }
    match range.span {
        Some(span) if span >= shape.spans => {
            let spans = shape.spans;
            Err(ClusterError::Placement(format!("layer span {span}: the model has {spans}, counted from 0")))
        }
        _ => Ok(()),
    }
}

fn shard(index: u32, of: u32, shape: CellShape) -> Result<BTreeSet<CellId>, ClusterError> {
    let total = shape.count();
    if u64::from(of) > total {
        return Err(ClusterError::Placement(format!("shard {index}/{of}: the model has only {total} cells")));
    }
    let bound = |part: u32| (total * u64::from(part) / u64::from(of)) as usize;
    let (first, end) = (bound(index - 1), bound(index));
    Ok(shape.cells().skip(first).take(end - first).collect())
}

fn auto_count(asked: Option<u32>, shape: CellShape, fits: usize) -> Result<usize, ClusterError> {
    let total = shape.count();
    match asked {
        Some(count) if u64::from(count) > total => {
            Err(ClusterError::Placement(format!("cells auto:{count}: the model has only {total} cells")))
        }
        Some(count) => Ok(count as usize),
        None if fits == 0 => Err(ClusterError::Placement("cells auto: not one cell fits in memory".to_owned())),
        None => Ok(fits.min(usize::try_from(total).unwrap_or(usize::MAX))),
    }
}

/// All cells, the one that needs a replica most first.
fn neediest(shape: CellShape, view: &ClusterView, loads: &Loads) -> Vec<CellId> {
    let mut replicas: BTreeMap<CellId, usize> = shape.cells().map(|cell| (cell, 0)).collect();
    let staying = view.of(Role::Expert).filter(|member| member.state != MemberState::Leaving);
    for cell in staying.flat_map(|member| &member.cells) {
        replicas.entry(*cell).and_modify(|count| *count += 1);
    }
    let load = |cell: &CellId| loads.get(cell).copied().unwrap_or(0.0);
    let mut cells: Vec<CellId> = replicas.keys().copied().collect();
    cells.sort_by(|a, b| replicas[a].cmp(&replicas[b]).then(load(b).total_cmp(&load(a))).then(a.cmp(b)));
    cells
}

#[cfg(test)]
mod tests;
