//! Routed experts on the CUDA device: one grouped product after the other for all of them.

use super::{
    CudaError, Driver,
    buffers::Growing,
    grouped::{Block, Index, Operands, Served, Sizes, matrices, runs},
    kernel::Address,
    shared::CudaShared,
    sums::{self, Filled, RowsPlace},
    weights::CudaMatrix,
};
use crate::{Dtype, ExpertRows, GroupedSums, RowsAt, SumsAt, Wanted, activation};

/// Where the rows begin behind the tables.
const ROWS_ALIGN: usize = 256;

/// Working memory of grouped blocks.
#[derive(Debug)]
pub(super) struct Experts<M> {
    memory: Growing<M>,
    operands: Operands<M>,
    sums: Vec<u8>,
}

impl<M> Default for Experts<M> {
    fn default() -> Self {
        Self { memory: Growing::default(), operands: Operands::default(), sums: Vec::new() }
    }
}

type Rows<'a, M> = ExpertRows<'a, CudaMatrix<M>>;

/// What is to be filled: see [`GroupedSums`].
struct Request<'a, M> {
    x: &'a [RowsAt<'a, CudaShared<M>>],
    experts: &'a [&'a Rows<'a, M>],
    slots: usize,
    /// u32 that go up with the tables.
    extra: Vec<u32>,
    /// Sums that are laid together to be read.
    gathered: usize,
}

impl<M: Send + Sync + 'static> Experts<M> {
    /// `sums [S, H]` of rows in bf16, in parts. Waits.
    pub(super) fn run<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        x: &[&[u8]],
        experts: &[Rows<'_, M>],
        sums: &mut [f32],
    ) -> Result<(), CudaError> {
        let experts = with_rows(experts);
        let Some(one) = experts.first() else {
            sums.fill(0.0);
            return Ok(());
        };
        let x: Vec<_> = x.iter().map(|part| RowsAt::Host(part)).collect();
        let slots = sums.len() / one.ffn.gate.cols;
        let request = Request { x: &x, experts: &experts, slots, extra: Vec::new(), gathered: 0 };
        let Self { memory, operands, sums: bytes } = self;
        let filled = fill(driver, memory, operands, &request)?;
        bytes.resize(sums.len() * Dtype::Bf16.size(), 0);
        driver.download(filled.memory, filled.slots, bytes)?;
        activation::decode_into(Dtype::Bf16, bytes, sums);
        Ok(())
    }

    /// The same of rows and to sums that may lie in shared memory, added up. Waits.
    pub(super) fn run_sums<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        work: &GroupedSums<'_, CudaMatrix<M>, CudaShared<M>>,
        wanted: &mut [Wanted<'_, CudaShared<M>>],
    ) -> Result<(), CudaError> {
        let experts = with_rows(work.experts);
        if experts.is_empty() {
            assert!(wanted.iter().all(|sums| sums.slots.is_empty()), "sums of no experts");
            return Ok(());
        }
        let adds = work.levels.iter().flatten().flatten();
        let extra = adds.chain(wanted.iter().flat_map(|sums| sums.slots)).copied().collect();
        let of_host = wanted.iter().filter(|sums| matches!(sums.to, SumsAt::Host(_)));
        let gathered = of_host.map(|sums| sums.slots.len()).sum();
        let request = Request { x: work.x, experts: &experts, slots: work.slots, extra, gathered };
        let Self { memory, operands, sums: bytes } = self;
        let filled = fill(driver, memory, operands, &request)?;
        filled.lay_down(driver, work.levels, wanted)?;
        bytes.resize(filled.row_bytes() * gathered, 0);
        driver.download(filled.memory, filled.gathered, bytes)?;
        let mut bytes = &bytes[..];
        for sums in wanted {
            if let SumsAt::Host(to) = &mut sums.to {
                let (own, rest) = bytes.split_at(filled.row_bytes() * sums.slots.len());
                to.clear();
                to.extend_from_slice(own);
                bytes = rest;
            }
        }
        Ok(())
    }
}

fn with_rows<'a, M>(experts: &'a [Rows<'a, M>]) -> Vec<&'a Rows<'a, M>> {
    experts.iter().filter(|expert| !expert.rows.is_empty()).collect()
}

/// Queues what fills the slots.
fn fill<'m, D: Driver>(
    driver: &D,
    memory: &'m mut Growing<D::Memory>,
    operands: &mut Operands<D::Memory>,
    request: &Request<'_, D::Memory>,
) -> Result<Filled<'m, D::Memory>, CudaError> {
    let &Request { x, experts, slots, .. } = request;
    let (hidden, inner) = (experts[0].ffn.gate.cols, experts[0].ffn.gate.rows);
    let (bf16, f32) = (Dtype::Bf16.size(), Dtype::F32.size());
    let rows: usize = x.iter().map(|part| sums::count(part, hidden)).sum();
    let sizes = Sizes { pairs: experts.iter().map(|expert| expert.rows.len()).sum(), slots, hidden, inner };
    let served: Vec<Served> = experts.iter().map(|expert| Served::new(driver, expert.ffn)).collect::<Result<_, _>>()?;
    let tables = Tables::new(experts, slots, &served);
    let extra = [&sums::shared_rows(x)[..], &request.extra].concat();
    let rows_at = (tables.bytes() + size_of_val(&extra[..])).next_multiple_of(ROWS_ALIGN);
    let (up, gathered) = (rows_at + rows * hidden * bf16, request.gathered * hidden * bf16);
    let parts = [up, sizes.pairs * hidden * f32, slots * hidden * bf16, gathered];
    let (memory, [_, y, out, gathered]) = memory.parts(driver, parts)?;
    // All that the block needs goes up in one copy, but for rows behind those that lie in shared memory.
    let head = [&tables.parts()[..], &[bytemuck::cast_slice(&extra)]].concat();
    let place = RowsPlace { memory, rows: rows_at, index: tables.bytes(), hidden };
    let extra = place.take(driver, head, x)?;

    let address = |start: usize| driver.address(memory) + start as u64;
    let block = Block { sizes, index: tables.at(address(0)), offsets: &tables.offsets };
    block.gather(driver, address(rows_at), &mut operands.x)?;
    block.products(driver, &runs(&served), operands, address(y))?;
    block.combine(driver, address(y), address(out))?;
    Ok(Filled { memory, hidden, slots: out, extra, gathered })
}

/// What kernels look up, on the host: see [`Index`].
struct Tables {
    matrices: Vec<Address>,
    rows: Vec<u32>,
    weights: Vec<f32>,
    offsets: Vec<u32>,
    first: Vec<u32>,
    pairs: Vec<u32>,
}

impl Tables {
    fn new<M>(experts: &[&Rows<'_, M>], slot_count: usize, served: &[Served]) -> Self {
        let slots: Vec<u32> = experts.iter().flat_map(|expert| expert.slots).copied().collect();
        let ends = experts.iter().scan(0, |end, expert| {
            *end += expert.rows.len() as u32;
            Some(*end)
        });
        let (first, pairs) = by_slot(&slots, slot_count);
        Self {
            matrices: matrices(served),
            rows: experts.iter().flat_map(|expert| expert.rows).copied().collect(),
            weights: experts.iter().flat_map(|expert| expert.weights).copied().collect(),
            offsets: std::iter::once(0).chain(ends).collect(),
            first,
            pairs,
        }
    }

    /// One behind the other; the addresses first, as they are of eight bytes.
    fn parts(&self) -> [&[u8]; 6] {
        [
            bytemuck::cast_slice(&self.matrices),
            bytemuck::cast_slice(&self.rows),
            bytemuck::cast_slice(&self.weights),
            bytemuck::cast_slice(&self.offsets),
            bytemuck::cast_slice(&self.first),
            bytemuck::cast_slice(&self.pairs),
        ]
    }

    fn bytes(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }

    /// Where they are on the device if they begin there.
    fn at(&self, mut next: Address) -> Index {
        let [matrices, rows, weights, offsets, first, pairs] = self.parts().map(|part| {
            let address = next;
            next += part.len() as u64;
            address
        });
        Index { rows, weights, offsets, first, pairs, matrices }
    }
}

/// The pairs of each slot in order: where they begin `[S + 1]`, and which they are.
fn by_slot(slots: &[u32], count: usize) -> (Vec<u32>, Vec<u32>) {
    let mut first = vec![0; count + 1];
    slots.iter().for_each(|slot| first[*slot as usize + 1] += 1);
    (0..count).for_each(|slot| first[slot + 1] += first[slot]);
    let (mut next, mut pairs) = (first.clone(), vec![0; slots.len()]);
    for (pair, slot) in slots.iter().enumerate() {
        pairs[next[*slot as usize] as usize] = pair as u32;
        next[*slot as usize] += 1;
    }
    (first, pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_a_slot_keep_their_order() {
        let (first, pairs) = by_slot(&[2, 0, 2, 3, 0, 2], 5);
        assert_eq!(first, [0, 2, 2, 5, 6, 6]);
        assert_eq!(pairs, [1, 4, 0, 2, 5, 3]);
    }
}
