//! Routed experts on the CUDA device: one grouped product after the other for all of them.

use super::{
    CudaError, Driver,
    buffers::Growing,
    plain::{Address, CombinePairs, GatherBf16, GroupedLinear, RoundBf16, Swiglu},
    weights::CudaMatrix,
};
use crate::{Dtype, ExpertRows, activation};

/// Working memory of grouped blocks.
#[derive(Debug)]
pub(super) struct Experts<M> {
    memory: Growing<M>,
    index: Growing<M>,
    sums: Vec<u8>,
}

impl<M> Default for Experts<M> {
    fn default() -> Self {
        Self { memory: Growing::default(), index: Growing::default(), sums: Vec::new() }
    }
}

/// Sizes of a grouped block: `R` rows, `P` pairs of a row and an expert, `S` slots, `X` experts.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    pairs: usize,
    slots: usize,
    experts: usize,
    largest: usize,
    hidden: usize,
    inner: usize,
}

/// What kernels look up, on the device.
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
    /// Addresses `[X]` of each kind of matrix.
    matrices: [Address; 3],
}

impl<M: Send + Sync + 'static> Experts<M> {
    /// `sums [S, H]` of rows in bf16, in parts. Waits.
    pub(super) fn run<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        x: &[&[u8]],
        experts: &[ExpertRows<'_, CudaMatrix<M>>],
        sums: &mut [f32],
    ) -> Result<(), CudaError> {
        let experts: Vec<&ExpertRows<'_, _>> = experts.iter().filter(|expert| !expert.rows.is_empty()).collect();
        let Some(one) = experts.first() else {
            sums.fill(0.0);
            return Ok(());
        };
        let (hidden, inner) = (one.ffn.gate.cols, one.ffn.gate.rows);
        let sizes = Sizes {
            rows: x.iter().map(|part| part.len()).sum::<usize>() / (hidden * Dtype::Bf16.size()),
            pairs: experts.iter().map(|expert| expert.rows.len()).sum(),
            slots: sums.len() / hidden,
            experts: experts.len(),
            largest: experts.iter().map(|expert| expert.rows.len()).max().unwrap_or(0),
            hidden,
            inner,
        };
        let index = index(driver, &mut self.index, &experts, sizes)?;
        let (bf16, f32) = (Dtype::Bf16.size(), Dtype::F32.size());
        let (memory, [wire, x_pairs, gate, up, product, y, combined, rounded]) = self.memory.parts(
            driver,
            [
                sizes.rows * hidden * bf16,
                sizes.pairs * hidden * bf16,
                sizes.pairs * inner * f32,
                sizes.pairs * inner * f32,
                sizes.pairs * inner * bf16,
                sizes.pairs * hidden * f32,
                sums.len() * f32,
                sums.len() * bf16,
            ],
        )?;
        let mut at = wire;
        for part in x {
            driver.upload(memory, at, part)?;
            at += part.len();
        }
        let address = |start: usize| driver.address(memory) + start as u64;
        let block = Block { sizes, index, x: address(x_pairs), gate: address(gate), up: address(up) };
        block.gather(driver, address(wire))?;
        block.run(driver, address(product), address(y))?;
        block.combine(driver, address(y), address(combined))?;
        RoundBf16 { x: address(combined), out: address(rounded), n: sums.len() as u64 }.launch(driver)?;
        self.sums.resize(sums.len() * bf16, 0);
        driver.download(memory, rounded, &mut self.sums)?;
        activation::decode_into(Dtype::Bf16, &self.sums, sums);
        Ok(())
    }
}

/// Uploads what kernels look up.
fn index<D: Driver>(
    driver: &D,
    memory: &mut Growing<D::Memory>,
    experts: &[&ExpertRows<'_, CudaMatrix<D::Memory>>],
    sizes: Sizes,
) -> Result<Index, CudaError> {
    let rows: Vec<u32> = experts.iter().flat_map(|expert| expert.rows).copied().collect();
    let weights: Vec<f32> = experts.iter().flat_map(|expert| expert.weights).copied().collect();
    let slots: Vec<u32> = experts.iter().flat_map(|expert| expert.slots).copied().collect();
    let ends = experts.iter().scan(0, |end, expert| {
        *end += expert.rows.len() as u32;
        Some(*end)
    });
    let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let (first, pairs) = by_slot(&slots, sizes.slots);
    let addresses = |of: fn(&ExpertRows<'_, CudaMatrix<D::Memory>>) -> Address| -> Vec<u64> {
        experts.iter().map(|expert| of(expert)).collect()
    };
    let matrices = [
        addresses(|expert| expert.ffn.gate.address),
        addresses(|expert| expert.ffn.up.address),
        addresses(|expert| expert.ffn.down.address),
    ]
    .concat();
    // The addresses first: they are of eight bytes.
    let tables: [&[u8]; 6] = [
        bytemuck::cast_slice(&matrices),
        bytemuck::cast_slice(&rows),
        bytemuck::cast_slice(&weights),
        bytemuck::cast_slice(&offsets),
        bytemuck::cast_slice(&first),
        bytemuck::cast_slice(&pairs),
    ];
    let all = tables.concat();
    let memory = memory.fit(driver, all.len())?;
    driver.upload(memory, 0, &all)?;
    let mut next = driver.address(memory);
    let [matrices, rows, weights, offsets, first, pairs] = tables.map(|table| {
        let address = next;
        next += table.len() as u64;
        address
    });
    let kind = (sizes.experts * size_of::<u64>()) as u64;
    Ok(Index { rows, weights, offsets, first, pairs, matrices: [matrices, matrices + kind, matrices + 2 * kind] })
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
    x: Address,
    gate: Address,
    up: Address,
}

impl Block {
    fn gather<D: Driver>(&self, driver: &D, x: Address) -> Result<(), CudaError> {
        let (hidden, pairs) = (self.sizes.hidden as u32, self.sizes.pairs as u32);
        GatherBf16 { x, rows: self.index.rows, out: self.x, hidden, pairs }.launch(driver)
    }

    fn product<D: Driver>(
        &self,
        driver: &D,
        matrix: usize,
        (x, inner): (Address, usize),
        (y, outputs): (Address, usize),
    ) -> Result<(), CudaError> {
        GroupedLinear {
            x,
            weights: self.index.matrices[matrix],
            offsets: self.index.offsets,
            y,
            inner: inner as u32,
            outputs: outputs as u32,
            groups: self.sizes.experts as u32,
            largest: self.sizes.largest as u32,
        }
        .launch(driver)
    }

    /// `y [P, H]`
    fn run<D: Driver>(&self, driver: &D, product: Address, y: Address) -> Result<(), CudaError> {
        let Sizes { hidden, inner, pairs, .. } = self.sizes;
        self.product(driver, 0, (self.x, hidden), (self.gate, inner))?;
        self.product(driver, 1, (self.x, hidden), (self.up, inner))?;
        Swiglu { gate: self.gate, up: self.up, out: product, n: (pairs * inner) as u64 }.launch(driver)?;
        self.product(driver, 2, (product, inner), (y, hidden))
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
