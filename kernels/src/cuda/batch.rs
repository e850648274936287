//! The rows of a step on the CUDA device: everything that kernels look up by row, in one upload.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    CudaError, Driver,
    buffers::Growing,
    kernel::Address,
    sm90::{self, MlaItem},
};
use crate::StepRows;

/// Positions of a split.
const SPLIT: u32 = 512;
/// Reduced splits held at a time, in f32 values; more where rows that cannot be parted need them.
const PARTIALS: usize = 64 << 20;

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
    host: Host,
    work: Mutex<Work<M>>,
}

/// What the host has to know of the rows.
#[derive(Debug, Default)]
struct Host {
    /// The positions that each row sees.
    seen: Vec<u32>,
    /// The rows of each sequence; none where keys and values are expanded, of which rows see nothing here.
    spans: Vec<Range<usize>>,
    /// Rows up to the last whose queries are absorbed.
    absorbed: usize,
    expanded: Vec<ExpandedSpan>,
}

/// The rows of a sequence for which keys and values are expanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExpandedSpan {
    pub(super) rows: Range<usize>,
    /// Of the first row.
    pub(super) position: usize,
    /// u32: cache blocks of the sequence
    pub(super) blocks: Address,
}

/// The work of attention on sm_90a, for some number of heads.
#[derive(Debug)]
pub(super) struct Work<M> {
    /// [`MlaItem`]s of these heads, if they did not come with the tables.
    own: Growing<M>,
    heads: usize,
    pub(super) items: Address,
    pub(super) passes: Vec<Pass>,
}

/// Rows whose splits are reduced and merged before those of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pass {
    pub(super) rows: Range<usize>,
    /// Splits of the row that has most.
    pub(super) splits: usize,
    /// Which of the items, where these are of interest.
    pub(super) items: Range<usize>,
}

impl<M> Default for CudaBatch<M> {
    fn default() -> Self {
        let work = Work { own: Growing::default(), heads: 0, items: 0, passes: Vec::new() };
        Self {
            tables: Growing::default(),
            tokens: 0,
            positions: 0,
            slots: 0,
            sequences: 0,
            keys: 0,
            first_block: 0,
            blocks: 0,
            host: Host::default(),
            work: Mutex::new(work),
        }
    }
}

impl<M> CudaBatch<M> {
    pub(super) fn rows(&self) -> usize {
        self.host.seen.len()
    }

    /// Rows up to the last whose queries are absorbed: what is computed for expanded spans before it means nothing.
    pub(super) fn absorbed(&self) -> usize {
        self.host.absorbed
    }

    pub(super) fn expanded(&self) -> &[ExpandedSpan] {
        &self.host.expanded
    }

    /// Takes rows over; with the work of attention on sm_90a, where it is known for how many heads.
    pub(super) fn load<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        rows: &StepRows,
        heads: Option<usize>,
    ) -> Result<(), CudaError> {
        let spans = || rows.spans.iter().enumerate();
        let sequences: Vec<u32> = spans().flat_map(|(index, span)| vec![index as u32; span.rows]).collect();
        self.host = Host::new(rows);
        let mut blocks = Vec::new();
        let first_block: Vec<u32> = spans()
            .map(|(_, span)| {
                let first = blocks.len() as u32;
                blocks.extend_from_slice(&span.blocks);
                first
            })
            .collect();
        let (items, passes) = heads.map_or_else(Default::default, |heads| self.host.work(heads, sm90::LATENT));
        // The items first: they lie at multiples of 16 bytes.
        let tables: [&[u8]; 8] = [
            bytemuck::cast_slice(&items),
            bytemuck::cast_slice(&rows.tokens),
            bytemuck::cast_slice(&rows.positions),
            bytemuck::cast_slice(&rows.slots),
            bytemuck::cast_slice(&sequences),
            bytemuck::cast_slice(&self.host.seen),
            bytemuck::cast_slice(&first_block),
            bytemuck::cast_slice(&blocks),
        ];
        let memory = self.tables.fit(driver, tables.iter().map(|table| table.len()).sum())?;
        driver.upload_parts(memory, 0, &tables)?;
        let mut next = driver.address(memory);
        let addresses = tables.map(|table| {
            let address = next;
            next += table.len() as u64;
            address
        });
        let [.., blocks] = addresses;
        for (span, first) in self.host.expanded.iter_mut().zip(spans().filter(|(_, span)| span.expanded)) {
            span.blocks = blocks + u64::from(first_block[first.0]) * size_of::<u32>() as u64;
        }
        let work = self.work.get_mut().unwrap_or_else(PoisonError::into_inner);
        [
            work.items,
            self.tokens,
            self.positions,
            self.slots,
            self.sequences,
            self.keys,
            self.first_block,
            self.blocks,
        ] = addresses;
        (work.heads, work.passes) = (heads.unwrap_or(0), passes);
        Ok(())
    }

    /// The work of attention on sm_90a. It is uploaded now if the rows came without it or with that of other heads: behind the
    /// launches that read what was there. Hold the guard until what reads it is queued.
    pub(super) fn work<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        heads: usize,
    ) -> Result<MutexGuard<'_, Work<M>>, CudaError> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if work.heads != heads {
            let (items, passes) = self.host.work(heads, sm90::LATENT);
            let memory = work.own.fit(driver, size_of_val(&items[..]))?;
            driver.upload(memory, 0, bytemuck::cast_slice(&items))?;
            work.items = driver.address(memory);
            (work.heads, work.passes) = (heads, passes);
        }
        Ok(work)
    }

    /// The passes of attention where rows may be parted anywhere.
    pub(super) fn passes(&self, heads: usize, latent: usize) -> Vec<Pass> {
        self.host.passes((0..self.absorbed()).map(|row| (row..row + 1, 0)), heads, latent)
    }
}

impl Host {
    fn new(rows: &StepRows) -> Self {
        let mut host = Self { seen: rows.positions.iter().map(|position| position + 1).collect(), ..Self::default() };
        for span in &rows.spans {
            let of_span = span.first_row..span.first_row + span.rows;
            if span.expanded {
                host.seen[of_span.clone()].fill(0);
                host.spans.push(of_span.start..of_span.start);
                host.expanded.push(ExpandedSpan { rows: of_span, position: span.first_position, blocks: 0 });
            } else {
                host.absorbed = of_span.end;
                host.spans.push(of_span);
            }
        }
        host
    }

    fn splits(&self, rows: Range<usize>) -> usize {
        self.seen[rows].iter().max().map_or(1, |keys| keys.div_ceil(SPLIT)) as usize
    }

    /// Items of all rows, and in which passes they are worked off.
    fn work(&self, heads: usize, latent: usize) -> (Vec<MlaItem>, Vec<Pass>) {
        let (mut items, mut parts) = (Vec::new(), Vec::new());
        for (sequence, span) in self.spans.iter().enumerate() {
            let together = sm90::rows_together(heads);
            for first in span.clone().step_by(together) {
                let rows = first..(first + together).min(span.end);
                let before = items.len();
                items.extend(sm90::items(rows.clone(), sequence, heads, &self.seen));
                parts.push((rows, items.len() - before));
            }
        }
        let passes = self.passes(parts.into_iter(), heads, latent);
        (items, passes)
    }

    /// Puts neighbouring rows and their items together while their reduced splits are not too many.
    fn passes(&self, parts: impl Iterator<Item = (Range<usize>, usize)>, heads: usize, latent: usize) -> Vec<Pass> {
        let most = self.splits(0..self.seen.len()).max(1) * heads * (latent + 2);
        let at_once = (PARTIALS / most).max(1);
        let mut passes: Vec<Pass> = Vec::new();
        for (rows, items) in parts {
            let splits = self.splits(rows.clone());
            match passes.last_mut() {
                Some(pass) if rows.end - pass.rows.start <= at_once => {
                    pass.rows.end = rows.end;
                    pass.items.end += items;
                    pass.splits = pass.splits.max(splits);
                }
                before => {
                    let first = before.map_or(0, |pass| pass.items.end);
                    passes.push(Pass { rows, splits, items: first..first + items });
                }
            }
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spans of so many rows, of which the last sees so many positions.
    fn host(spans: &[(usize, u32)]) -> Host {
        let mut host = Host::default();
        for (rows, keys) in spans {
            let first = host.seen.len();
            host.spans.push(first..first + rows);
            host.seen.extend(keys + 1 - *rows as u32..=*keys);
        }
        host
    }

    #[test]
    fn rows_are_worked_off_in_one_pass_while_their_splits_fit() {
        let (items, passes) = host(&[(1, 1000), (6, 6)]).work(16, 512);
        assert_eq!(passes, [Pass { rows: 0..7, splits: 2, items: 0..4 }]);
        assert_eq!(
            items.iter().map(|item| (item.first, item.rows)).collect::<Vec<_>>(),
            [(0, 16), (0, 16), (16, 64), (80, 32)]
        );
        // 160 splits of 128 heads: six rows at a time.
        let (items, passes) = host(&[(10, 81_920)]).work(128, 512);
        assert_eq!(passes.iter().map(|pass| pass.rows.clone()).collect::<Vec<_>>(), [0..6, 6..10]);
        assert_eq!((passes[0].items.clone(), passes[1].items.clone()), (0..1920, 1920..3200));
        assert_eq!(items[1920].first, 6 * 128);
    }

    #[test]
    fn expanded_spans_have_no_work_of_absorbed_ones() {
        let mut rows = StepRows::default();
        for (count, first, blocks) in [(2, 9, &[4][..]), (171, 0, &[0, 1, 2]), (1, 3, &[5]), (200, 0, &[6, 7, 8, 9])] {
            rows.push(&vec![0; count], first, blocks, 64);
        }
        rows.expand();
        let host = Host::new(&rows);
        assert_eq!((host.absorbed, &host.seen[..3], host.seen[173]), (174, &[10, 11, 0][..], 4));
        let spans = host.expanded.iter().map(|span| (span.rows.clone(), span.position)).collect::<Vec<_>>();
        assert_eq!(spans, [(2..173, 0), (174..374, 0)]);
        let (items, passes) = host.work(16, 512);
        assert_eq!(items.iter().map(|item| (item.first, item.sequence)).collect::<Vec<_>>(), [(0, 0), (173 * 16, 2)]);
        assert_eq!(passes, [Pass { rows: 0..174, splits: 1, items: 0..2 }]);
    }

    #[test]
    fn rows_that_stay_together_may_exceed_what_is_held() {
        let (_, passes) = host(&[(4, 1 << 24)]).work(16, 512);
        assert_eq!(passes, [Pass { rows: 0..4, splits: 1 << 15, items: 0..1 << 15 }]);
        let plain = host(&[(4, 1 << 24)]).passes((0..4).map(|row| (row..row + 1, 0)), 16, 512);
        assert_eq!(plain.len(), 4);
    }
}
