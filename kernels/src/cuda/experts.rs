//! Routed experts on the CUDA device: one grouped product after the other for all of them.

use super::{
    CudaError, Driver,
    buffers::Growing,
    kernel::Address,
    operand::{Operand, View},
    plain::{CombinePairs, GatherBf16, GroupedLinear, Swiglu},
    products::blocks,
    shared::CudaShared,
    sm90::{self, Tokens},
    sums::{self, Filled, RowsPlace},
    weights::{self, CudaMatrix, Tiles},
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

/// What the products of a grouped block read, and what they leave on the way.
#[derive(Debug)]
struct Operands<M> {
    /// The row of each pair `[P, H]`.
    x: Operand<M>,
    /// `silu(gate · x) ⊙ (up · x)` `[P, I]`
    product: Operand<M>,
    /// f32 gate and up `[P, I]`, of plain products.
    gate_up: Growing<M>,
}

impl<M> Default for Experts<M> {
    fn default() -> Self {
        let operands = Operands { x: Operand::default(), product: Operand::default(), gate_up: Growing::default() };
        Self { memory: Growing::default(), operands, sums: Vec::new() }
    }
}

/// Sizes of a grouped block: `P` pairs of a row and an expert, `S` slots.
#[derive(Clone, Copy)]
struct Sizes {
    pairs: usize,
    slots: usize,
    hidden: usize,
    inner: usize,
}

/// What kernels look up, on the device; `X` experts.
struct Index {
    /// u32 `[P]`
    rows: Address,
    /// f32 `[P]`
    weights: Address,
    /// u32 `[X + 1]`
    offsets: Address,
    /// u32 `[S + 1]`
    first: Address,
    /// u32 `[P]`
    pairs: Address,
    /// u64 `[2 or 3, X]`: see [`Served`].
    matrices: Address,
}

/// The kernels that serve the experts, and what these find weights by.
enum Served {
    /// The plain ones: where gate, up and down lie.
    Plain([Vec<Address>; 3]),
    /// Those for sm_90a: maps of gate with up, and of down.
    Sm90([Vec<Address>; 2]),
}

impl Served {
    fn new<D: Driver>(driver: &D, experts: &[&Rows<'_, D::Memory>]) -> Result<Self, CudaError> {
        let tiles = experts.iter().map(|expert| weights::block(driver, expert.ffn)).collect::<Result<Vec<_>, _>>()?;
        if let Some(tiles) = tiles.into_iter().collect::<Option<Vec<(Tiles, Tiles)>>>() {
            let (gate_up, down): (Vec<Tiles>, Vec<Tiles>) = tiles.into_iter().unzip();
            return Ok(Self::Sm90([gate_up, down].map(|tiles| tiles.iter().map(|tiles| tiles.map).collect())));
        }
        let of = |matrix: fn(&Rows<'_, D::Memory>) -> Address| experts.iter().map(|expert| matrix(expert)).collect();
        let (gate, up) = (of(|expert| expert.ffn.gate.address), of(|expert| expert.ffn.up.address));
        Ok(Self::Plain([gate, up, of(|expert| expert.ffn.down.address)]))
    }

    fn matrices(&self) -> Vec<Address> {
        match self {
            Self::Plain(matrices) => matrices.concat(),
            Self::Sm90(maps) => maps.concat(),
        }
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
    let served = Served::new(driver, experts)?;
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
    let groups = experts.iter().map(|expert| expert.rows.len()).collect();
    let block = Block { sizes, index: tables.at(address(0)), groups };
    block.gather(driver, address(rows_at), &mut operands.x)?;
    match served {
        Served::Plain(_) => block.plain(driver, operands, address(y))?,
        Served::Sm90(_) => block.sm90(driver, operands, address(y))?,
    }
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
    fn new<M>(experts: &[&Rows<'_, M>], slot_count: usize, served: &Served) -> Self {
        let slots: Vec<u32> = experts.iter().flat_map(|expert| expert.slots).copied().collect();
        let ends = experts.iter().scan(0, |end, expert| {
            *end += expert.rows.len() as u32;
            Some(*end)
        });
        let (first, pairs) = by_slot(&slots, slot_count);
        Self {
            matrices: served.matrices(),
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

/// Launches of one grouped block.
struct Block {
    sizes: Sizes,
    index: Index,
    /// Rows of each expert `[X]`.
    groups: Vec<usize>,
}

/// What a grouped product reads, and which of the experts' matrices; where its results go.
struct Product {
    matrix: usize,
    x: Address,
    inner: usize,
    y: Address,
    outputs: usize,
}

impl Block {
    fn gather<D: Driver>(&self, driver: &D, x: Address, out: &mut Operand<D::Memory>) -> Result<(), CudaError> {
        let Sizes { hidden, pairs, .. } = self.sizes;
        let out = out.fit(driver, pairs * hidden)?;
        GatherBf16 { x, rows: self.index.rows, out, hidden: hidden as u32, pairs: pairs as u32 }.launch(driver)
    }

    /// Where a matrix of an expert is found.
    fn matrices(&self, matrix: usize, group: usize) -> Address {
        self.index.matrices + ((matrix * self.groups.len() + group) * size_of::<Address>()) as u64
    }

    /// `y [P, H]` by the plain kernels.
    fn plain<D: Driver>(&self, driver: &D, operands: &mut Operands<D::Memory>, y: Address) -> Result<(), CudaError> {
        let Sizes { hidden, inner, pairs, .. } = self.sizes;
        let x = operands.x.address(driver)?;
        let product = operands.product.fit(driver, pairs * inner)?;
        let (memory, starts) = operands.gate_up.parts(driver, [pairs * inner * Dtype::F32.size(); 2])?;
        let [gate, up] = starts.map(|start| driver.address(memory) + start as u64);
        let of = |matrix, x, inner, y, outputs| Product { matrix, x, inner, y, outputs };
        self.plain_product(driver, of(0, x, hidden, gate, inner))?;
        self.plain_product(driver, of(1, x, hidden, up, inner))?;
        Swiglu { gate, up, out: product, n: (pairs * inner) as u64 }.launch(driver)?;
        self.plain_product(driver, of(2, product, inner, y, hidden))
    }

    fn plain_product<D: Driver>(&self, driver: &D, product: Product) -> Result<(), CudaError> {
        let Product { matrix, x, inner, y, outputs } = product;
        GroupedLinear {
            x,
            weights: self.matrices(matrix, 0),
            offsets: self.index.offsets,
            y,
            inner: inner as u32,
            outputs: outputs as u32,
            groups: self.groups.len() as u32,
            largest: self.groups.iter().max().map_or(0, |rows| *rows as u32),
        }
        .launch(driver)
    }

    /// `y [P, H]` by the kernels for sm_90a, as many experts a launch as these take.
    fn sm90<D: Driver>(&self, driver: &D, operands: &mut Operands<D::Memory>, y: Address) -> Result<(), CudaError> {
        let Sizes { hidden, inner, pairs, .. } = self.sizes;
        let product = operands.product.fit(driver, pairs * inner)?;
        let x = operands.x.map(driver, View::Rows(hidden))?;
        let between = operands.product.map(driver, View::Rows(inner))?;
        let of = |matrix, x, inner, y, outputs| Product { matrix, x, inner, y, outputs };
        for first in (0..self.groups.len()).step_by(sm90::GROUPS) {
            self.sm90_product(driver, first, true, of(0, x, hidden, product, inner))?;
            self.sm90_product(driver, first, false, of(1, between, inner, y, hidden))?;
        }
        Ok(())
    }

    /// Of the experts from the `first` on, as many as a launch takes.
    fn sm90_product<D: Driver>(
        &self,
        driver: &D,
        first: usize,
        gated: bool,
        product: Product,
    ) -> Result<(), CudaError> {
        let Product { matrix, x, inner, y, outputs } = product;
        let groups = &self.groups[first..self.groups.len().min(first + sm90::GROUPS)];
        let (tokens, weight_rows) = (Tokens::EXACT, if gated { 2 * outputs } else { outputs });
        let tiles = groups.iter().map(|rows| tokens.tiles(*rows, weight_rows)).sum();
        let begin = self.index.offsets + (first * size_of::<u32>()) as u64;
        sm90::GroupedProduct {
            x,
            weights: self.matrices(matrix, first),
            begin,
            end: begin + size_of::<u32>() as u64,
            y,
            rows: 0,
            groups: groups.len() as u32,
            inner: inner as u32,
            outputs: outputs as u32,
            gated,
            tokens,
            blocks: blocks(driver, tokens, tiles),
        }
        .launch(driver)
    }

    fn combine<D: Driver>(&self, driver: &D, y: Address, out: Address) -> Result<(), CudaError> {
        let Index { weights, first, pairs, .. } = self.index;
        let (hidden, slots) = (self.sizes.hidden as u32, self.sizes.slots as u32);
        CombinePairs { y, weights, first, pairs, out, hidden, slots }.launch(driver)
    }
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
