//! Rows of grouped blocks that lie in shared memory, and sums that go there.

use super::{
    CudaError, Driver,
    kernel::Address,
    plain::{AddSlots, GatherBf16},
    shared::CudaShared,
};
use crate::{Dtype, RowsAt, SumsAt, Wanted, cell_tree::Levels};

const BF16: usize = Dtype::Bf16.size();
const U32: u64 = size_of::<u32>() as u64;

/// Rows of a part.
pub(super) fn count<S>(part: &RowsAt<'_, S>, hidden: usize) -> usize {
    match part {
        RowsAt::Host(bytes) => bytes.len() / (hidden * BF16),
        RowsAt::Shared(_, rows) => rows.len(),
    }
}

/// Which rows are to be had from shared memory, one part behind the other.
pub(super) fn shared_rows<S>(x: &[RowsAt<'_, S>]) -> Vec<u32> {
    let of = |part: &RowsAt<'_, S>| match part {
        RowsAt::Host(_) => Vec::new(),
        RowsAt::Shared(_, rows) => rows.to_vec(),
    };
    x.iter().flat_map(of).collect()
}

/// Where a grouped block finds its rows.
pub(super) struct RowsPlace<'a, M> {
    pub(super) memory: &'a M,
    /// Where they begin: bf16 `[R, H]`.
    pub(super) rows: usize,
    /// Where the numbers of [`shared_rows`] begin.
    pub(super) index: usize,
    pub(super) hidden: usize,
}

impl<M> RowsPlace<'_, M> {
    /// Uploads `head` to the beginning of the memory and brings the rows. The address behind the row numbers.
    pub(super) fn take<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        head: Vec<&[u8]>,
        x: &[RowsAt<'_, CudaShared<M>>],
    ) -> Result<Address, CudaError> {
        let padding = vec![0; self.rows - head.iter().map(|part| part.len()).sum::<usize>()];
        let (mut upload, mut start, mut at) = ([&head[..], &[&padding[..]]].concat(), 0, self.rows);
        let (mut gathers, mut index) = (Vec::new(), driver.address(self.memory) + self.index as u64);
        for part in x {
            let rows = count(part, self.hidden);
            match part {
                RowsAt::Host(bytes) => upload.push(bytes),
                RowsAt::Shared(memory, numbers) => {
                    let end = numbers.iter().max().map_or(0, |last| *last as usize + 1) * self.hidden * BF16;
                    gathers.push(self.gather(driver, memory.address(driver, end)?, (index, rows), at));
                    index += rows as u64 * U32;
                    driver.upload_parts(self.memory, start, &upload)?;
                    upload.clear();
                    start = at + rows * self.hidden * BF16;
                }
            }
            at += rows * self.hidden * BF16;
        }
        if !upload.is_empty() {
            driver.upload_parts(self.memory, start, &upload)?;
        }
        gathers.iter().try_for_each(|gather| gather.launch(driver))?;
        Ok(index)
    }

    fn gather<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        x: Address,
        (rows, pairs): (Address, usize),
        at: usize,
    ) -> GatherBf16 {
        let out = driver.address(self.memory) + at as u64;
        GatherBf16 { x, rows, out, hidden: self.hidden as u32, pairs: pairs as u32 }
    }
}

/// Slots that are filled once what was queued before is done.
pub(super) struct Filled<'a, M> {
    pub(super) memory: &'a M,
    pub(super) hidden: usize,
    /// Where the sums begin: bf16 `[S, H]`.
    pub(super) slots: usize,
    /// u32: `into` and `from` of each level, then the slots that are wanted.
    pub(super) extra: Address,
    /// Room for sums on their way to the host: bf16 `[.., H]`.
    pub(super) gathered: usize,
}

impl<M> Filled<'_, M> {
    /// Bytes of a sum.
    pub(super) fn row_bytes(&self) -> usize {
        self.hidden * BF16
    }

    /// Queues the additions, and the copies of what is wanted: into shared memory, and together for the host.
    pub(super) fn lay_down<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        levels: &Levels,
        wanted: &[Wanted<'_, CudaShared<M>>],
    ) -> Result<(), CudaError> {
        let (hidden, base) = (self.hidden as u32, driver.address(self.memory));
        let (slots, mut gathered) = (base + self.slots as u64, base + self.gathered as u64);
        let mut next = self.extra;
        for [into, _] in levels {
            let (count, bytes) = (into.len() as u32, into.len() as u64 * U32);
            AddSlots { slots, into: next, from: next + bytes, hidden, count }.launch(driver)?;
            next += 2 * bytes;
        }
        for sums in wanted {
            let bytes = self.row_bytes() * sums.slots.len();
            let out = match &sums.to {
                SumsAt::Shared(memory) => memory.address(driver, bytes)?,
                SumsAt::Host(_) => gathered,
            };
            GatherBf16 { x: slots, rows: next, out, hidden, pairs: sums.slots.len() as u32 }.launch(driver)?;
            next += sums.slots.len() as u64 * U32;
            if matches!(sums.to, SumsAt::Host(_)) {
                gathered += bytes as u64;
            }
        }
        Ok(())
    }
}
