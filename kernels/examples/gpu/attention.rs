//! Latent attention: splits, then their merge; and what takes their place under `--no-exact`.

use conclave_kernels::cuda::{
    CudaError, Driver, Element,
    plain::MergeSplits,
    sm90::{self, LATENT, MlaItem, MlaSplits, QUERIES, ROPE, maps},
};

use crate::{
    expanded,
    numbers::Picks,
    runner::{Distance, Error, Found, Runner, Stop, Work},
    sizes::Queries,
};

const CACHED: usize = LATENT + ROPE;
const PAGE: usize = 64;
const SPLIT: usize = 512;
/// Scores are products of 576 numbers in -1..1.
const SCALE: f32 = 0.13;
/// Queries that are compared with the definition.
const CHECKED: usize = 3;
const LIMIT: f64 = 1e-2;

/// A launch: queries, and in how many rows of a sequence an item has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    pub(crate) queries: Queries,
    pub(crate) rows_an_item: usize,
}

/// Its arguments in the device's memory, and where results begin.
struct Prepared<D: Driver> {
    _memory: Vec<D::Memory>,
    /// Of the first seven arguments of [`MlaSplits`].
    addresses: [u64; 7],
    items: usize,
    merged: u64,
}

/// Times of all queries.
pub(crate) fn measure<D: Driver>(runner: &mut Runner<D>) {
    for queries in runner.sizes.queries.clone() {
        let attention = Attention::of(queries);
        let Queries { heads, sequences, rows, context } = queries;
        let name = format!("{heads} heads, {sequences} x {rows} of {context}");
        runner.case(&format!("{name}, splits"), |runner| attention.time_splits(runner));
        runner.case(&format!("{name}, merge"), |runner| attention.time_merge(runner));
        if sequences == 1 && rows > 1 {
            runner.case(&format!("{name}, expanded"), |runner| expanded::time(runner, queries));
        }
    }
}

impl Attention {
    /// With as many rows an item as there is room for.
    pub(crate) fn of(queries: Queries) -> Self {
        Self { queries, rows_an_item: (QUERIES / queries.heads).clamp(1, queries.rows) }
    }

    fn time_splits<D: Driver>(self, runner: &Runner<D>) -> Result<Found, Stop> {
        let prepared = self.prepare(runner)?;
        let samples = runner.time(|| self.splits_of(runner.driver(), &prepared))?;
        self.merge(runner.driver(), &prepared)?;
        Ok(Found { samples, work: self.splits_work(), error: self.check(runner)? })
    }

    fn time_merge<D: Driver>(self, runner: &Runner<D>) -> Result<Found, Stop> {
        let prepared = self.prepare(runner)?;
        self.splits_of(runner.driver(), &prepared)?;
        let samples = runner.time(|| self.merge(runner.driver(), &prepared))?;
        let bytes = (self.parts_used() * (LATENT + 2) + self.merged_length()) * 4;
        Ok(Found { samples, work: Work { bytes: bytes as f64, ..Work::default() }, error: self.check(runner)? })
    }

    /// Bytes of the merged results of the first sequence.
    pub(crate) fn first_sequence<D: Driver>(self, runner: &Runner<D>) -> Result<Vec<u32>, Stop> {
        let prepared = self.prepare(runner)?;
        self.splits_of(runner.driver(), &prepared)?;
        self.merge(runner.driver(), &prepared)?;
        runner.results(self.merged_at(), self.queries.rows * self.queries.heads * LATENT)
    }

    fn splits(self) -> usize {
        self.queries.context.div_ceil(SPLIT)
    }

    /// Parts that rows have.
    fn parts_used(self) -> usize {
        let rows = 0..self.queries.total();
        rows.map(|row| self.queries.keys(row).div_ceil(SPLIT)).sum::<usize>() * self.queries.heads
    }

    fn merged_length(self) -> usize {
        self.queries.total() * self.queries.heads * LATENT
    }

    /// Where merged results begin, in f32: behind the parts.
    fn merged_at(self) -> usize {
        (self.queries.total() * self.queries.heads * self.splits() * (LATENT + 2)).next_multiple_of(64)
    }

    fn splits_work(self) -> Work {
        let Queries { heads, sequences, context, .. } = self.queries;
        let pairs: usize = (0..self.queries.total()).map(|row| self.queries.keys(row) * heads).sum();
        let latents = (sequences * context + self.queries.total() * heads) * CACHED * 2;
        Work {
            bytes: (latents + self.parts_used() * (LATENT + 2) * 4) as f64,
            flops: 2.0 * (pairs * (CACHED + LATENT)) as f64,
            fp8: false,
        }
    }

    fn pages(self) -> usize {
        self.queries.context.div_ceil(PAGE)
    }

    /// The pages of a sequence, in order of position: its own stretch of the cache, shuffled.
    fn blocks(self, sequence: usize) -> Vec<u32> {
        let (mut picks, pages) = (Picks::new(5), self.pages());
        let mut blocks: Vec<u32> = (0..pages).map(|page| (sequence * pages + page) as u32).collect();
        (1..pages).for_each(|at| blocks.swap(at, picks.below(at + 1)));
        blocks
    }

    /// Where the cache begins among the numbers: behind the most queries that there are, so that a sequence's latents and
    /// queries are the same whatever is beside it.
    fn cache_at<D: Driver>(runner: &Runner<D>) -> usize {
        let queries = runner.sizes.queries.iter().map(|queries| queries.total() * queries.heads * CACHED);
        queries.max().unwrap_or(0).next_multiple_of(128)
    }

    /// Of rows that see `keys` positions.
    fn items(self, keys: &[u32]) -> Vec<MlaItem> {
        let of = |sequence| {
            let rows = self.queries.of(sequence);
            let firsts = rows.clone().step_by(self.rows_an_item);
            firsts.flat_map(move |row| {
                sm90::items(row..rows.end.min(row + self.rows_an_item), sequence, self.queries.heads, keys)
            })
        };
        (0..self.queries.sequences).flat_map(of).collect()
    }

    fn prepare<D: Driver>(self, runner: &Runner<D>) -> Result<Prepared<D>, Stop> {
        let Queries { heads, sequences, .. } = self.queries;
        let (rows, slots) = (self.queries.total(), sequences * self.pages() * PAGE);
        let numbers = runner.bf16()?;
        let q = numbers.window(0, rows * heads * CACHED)?;
        let cache = numbers.window(Self::cache_at(runner), slots * CACHED)?;
        let map =
            |address, total| maps::rows(runner.driver(), address, Element::Bf16, (total, CACHED), maps::TILE_ROWS);
        let keys: Vec<u32> = (0..rows).map(|row| self.queries.keys(row) as u32).collect();
        let items = self.items(&keys);
        let first_block: Vec<u32> = (0..sequences).map(|sequence| (sequence * self.pages()) as u32).collect();
        let blocks: Vec<u32> = (0..sequences).flat_map(|sequence| self.blocks(sequence)).collect();
        let memory = [
            runner.upload(&[map(q, rows * heads)?])?,
            runner.upload(&[map(cache, slots)?])?,
            runner.upload(&items)?,
            runner.upload(&keys)?,
            runner.upload(&first_block)?,
            runner.upload(&blocks)?,
        ];
        let parts = runner.out((self.merged_at() + self.merged_length()) * 4)?.address;
        let [q, cache, of_items, keys, first_block, blocks] = memory.each_ref().map(|memory| runner.at(memory));
        let addresses = [q, cache, of_items, keys, first_block, blocks, parts];
        let merged = parts + (self.merged_at() * 4) as u64;
        Ok(Prepared { _memory: memory.into(), addresses, items: items.len(), merged })
    }

    fn splits_of<D: Driver>(self, driver: &D, prepared: &Prepared<D>) -> Result<(), CudaError> {
        let [q, cache, items, keys, first_block, blocks, out] = prepared.addresses;
        let (count, heads, splits) = (prepared.items as u32, self.queries.heads as u32, self.splits() as u32);
        let running = prepared.items.min(driver.multiprocessors()) as u32;
        MlaSplits { q, cache, items, keys, first_block, blocks, out, count, heads, splits, scale: SCALE, running }
            .launch(driver)
    }

    fn merge<D: Driver>(self, driver: &D, prepared: &Prepared<D>) -> Result<(), CudaError> {
        let (rows, heads) = (self.queries.total() as u32, self.queries.heads as u32);
        let [_, _, _, keys, _, _, parts] = prepared.addresses;
        let out = prepared.merged;
        let (splits, latent, rounded) = (self.splits() as u32, LATENT as u32, false);
        MergeSplits { parts, keys, out, splits, latent, rounded, rows, heads }.launch(driver)
    }

    /// Compares some merged results with the definition in f64.
    fn check<D: Driver>(self, runner: &Runner<D>) -> Result<Option<Error>, Stop> {
        let (mut picks, mut distance) = (Picks::new(3), Distance::default());
        for _ in 0..CHECKED {
            let (row, head) = (picks.below(self.queries.total()), picks.below(self.queries.heads));
            let query = row * self.queries.heads + head;
            let found: Vec<f32> = runner.results(self.merged_at() + query * LATENT, LATENT)?;
            let expected = self.expected(runner, row, query)?;
            found.iter().zip(expected).for_each(|(found, expected)| distance.add(f64::from(*found), expected));
        }
        Ok(distance.within(LIMIT))
    }

    fn expected<D: Driver>(self, runner: &Runner<D>, row: usize, query: usize) -> Result<Vec<f64>, Stop> {
        let numbers = runner.bf16()?;
        let blocks = self.blocks(row / self.queries.rows);
        let slot = |key: usize| blocks[key / PAGE] as usize * PAGE + key % PAGE;
        let key = |key: usize| numbers.values(Self::cache_at(runner) + slot(key) * CACHED, CACHED);
        let (q, keys) = (numbers.values(query * CACHED, CACHED), self.queries.keys(row));
        let dot = |key: Vec<f64>| q.iter().zip(key).map(|(q, key)| q * key).sum::<f64>();
        let scores: Vec<f64> = (0..keys).map(|at| dot(key(at)) * f64::from(SCALE)).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut sums, mut total) = (vec![0.0; LATENT], 0.0);
        for (at, score) in scores.iter().enumerate() {
            let weight = (score - most).exp();
            total += weight;
            sums.iter_mut().zip(key(at)).for_each(|(sum, value)| *sum += weight * value);
        }
        Ok(sums.into_iter().map(|sum| sum / total).collect())
    }
}
