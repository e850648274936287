//! The rows of a step on the CUDA device: everything that kernels look up by row, in one upload.

use super::{CudaError, Driver, buffers::Growing, plain::Address};
use crate::StepRows;

/// The rows of a step; `T` rows of `S` sequences.
#[derive(Debug)]
pub struct CudaBatch<M> {
    tables: Growing<M>,
    /// u32 `[T]`
    pub(super) tokens: Address,
    /// u32 `[T]`
    pub(super) positions: Address,
    /// u32 `[T]`
    pub(super) slots: Address,
    /// u32 `[T]`: the sequence of each row.
    pub(super) sequences: Address,
    /// u32 `[T]`: the positions that each row sees.
    pub(super) keys: Address,
    /// u32 `[S]`: where in `blocks` a sequence's begin.
    pub(super) first_block: Address,
    /// u32: blocks of one sequence after the other.
    pub(super) blocks: Address,
    /// The positions that each row sees, on the host.
    pub(super) seen: Vec<u32>,
}

impl<M> Default for CudaBatch<M> {
    fn default() -> Self {
        Self {
            tables: Growing::default(),
            tokens: 0,
            positions: 0,
            slots: 0,
            sequences: 0,
            keys: 0,
            first_block: 0,
            blocks: 0,
            seen: Vec::new(),
        }
    }
}

impl<M> CudaBatch<M> {
    pub(super) fn rows(&self) -> usize {
        self.seen.len()
    }

    pub(super) fn load<D: Driver<Memory = M>>(&mut self, driver: &D, rows: &StepRows) -> Result<(), CudaError> {
        let spans = || rows.spans.iter().enumerate();
        let sequences: Vec<u32> = spans().flat_map(|(index, span)| vec![index as u32; span.rows]).collect();
        self.seen.clear();
        self.seen.extend(rows.positions.iter().map(|position| position + 1));
        let mut blocks = Vec::new();
        let first_block: Vec<u32> = spans()
            .map(|(_, span)| {
                let first = blocks.len() as u32;
                blocks.extend_from_slice(&span.blocks);
                first
            })
            .collect();
        let tables: [&[u32]; 7] =
            [&rows.tokens, &rows.positions, &rows.slots, &sequences, &self.seen, &first_block, &blocks];
        let all = tables.concat();
        let memory = self.tables.fit(driver, size_of_val(&all[..]))?;
        driver.upload(memory, 0, bytemuck::cast_slice(&all))?;
        let mut next = driver.address(memory);
        let addresses = tables.map(|table| {
            let address = next;
            next += size_of_val(table) as u64;
            address
        });
        [self.tokens, self.positions, self.slots, self.sequences, self.keys, self.first_block, self.blocks] = addresses;
        Ok(())
    }
}
