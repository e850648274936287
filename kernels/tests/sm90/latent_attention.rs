//! Splits of latent attention.

use conclave_kernels::cuda::{
    CudaError, Element,
    sm90::{self, MlaItem, MlaSplits, maps::TILE_ROWS, rows_together},
};

use crate::{
    each::{on_each, same_bits},
    maps,
    support::{Numbers, Rig},
};

const CACHED: usize = 576;
const LATENT: usize = 512;
const PAGE: usize = 64;
const SPLIT: usize = 512;
const SCALE: f32 = 0.13;

/// Queries of one sequence: how many rows, and the keys that the last of them sees.
#[derive(Clone, Copy)]
struct Sequence {
    rows: usize,
    keys: usize,
}

impl Sequence {
    fn keys_of(&self, row: usize) -> usize {
        self.keys - self.rows + row + 1
    }

    fn pages(&self) -> usize {
        self.keys.div_ceil(PAGE)
    }
}

/// What a launch works on: `q [T, heads, 576]`, latents of each sequence `[keys, 576]`.
struct Case {
    heads: usize,
    sequences: Vec<Sequence>,
    q: Vec<f32>,
    latents: Vec<Vec<f32>>,
}

impl Case {
    fn new(heads: usize, sequences: &[(usize, usize)]) -> Self {
        let sequences: Vec<_> = sequences.iter().map(|(rows, keys)| Sequence { rows: *rows, keys: *keys }).collect();
        let mut numbers = Numbers::new(heads as u64 + 3);
        let rows: usize = sequences.iter().map(|sequence| sequence.rows).sum();
        let q = numbers.rounded(rows * heads * CACHED, 1.0);
        let latents = sequences.iter().map(|sequence| numbers.rounded(sequence.keys * CACHED, 1.0)).collect();
        Self { heads, sequences, q, latents }
    }

    fn splits(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.keys.div_ceil(SPLIT)).max().unwrap_or(0)
    }

    /// (sequence, row of it) of each row.
    fn rows(&self) -> Vec<(usize, usize)> {
        let of = |(at, sequence): (usize, &Sequence)| (0..sequence.rows).map(move |row| (at, row)).collect::<Vec<_>>();
        self.sequences.iter().enumerate().flat_map(of).collect()
    }

    /// Items of up to `rows` rows each.
    fn items(&self, rows: usize) -> Vec<MlaItem> {
        let seen: Vec<u32> = self.rows().iter().map(|(at, row)| self.sequences[*at].keys_of(*row) as u32).collect();
        let (mut items, mut first) = (Vec::new(), 0);
        for (at, sequence) in self.sequences.iter().enumerate() {
            for row in (0..sequence.rows).step_by(rows) {
                let last = (row + rows).min(sequence.rows);
                items.extend(sm90::items(first + row..first + last, at, self.heads, &seen));
            }
            first += sequence.rows;
        }
        items
    }

    /// The cache with all but the sequences' own slots NaN, and each sequence's blocks.
    fn cache(&self) -> (Vec<f32>, Vec<u32>) {
        let pages: usize = self.sequences.iter().map(Sequence::pages).sum();
        let blocks = Numbers::new(9).distinct(pages, pages as u32 + 2);
        let mut cache = vec![f32::NAN; (pages + 2) * PAGE * CACHED];
        let mut free = blocks.iter();
        for latents in &self.latents {
            for (page, block) in latents.chunks(PAGE * CACHED).zip(&mut free) {
                let at = *block as usize * PAGE * CACHED;
                cache[at..at + page.len()].copy_from_slice(page);
            }
        }
        (cache, blocks)
    }

    /// `[T, heads, splits, 2 + 512]` with items of up to `rows` rows, in a random order; NaN where there are no keys. By what
    /// it ran on.
    fn splits_of(&self, rows: usize) -> Vec<(&'static str, Vec<f32>)> {
        let items = self.items(rows);
        let order = Numbers::new(rows as u64).distinct(items.len(), items.len() as u32);
        let items: Vec<MlaItem> = order.into_iter().map(|at| items[at as usize]).collect();
        on_each(|rig| self.launch(rig, &items))
    }

    fn launch(&self, rig: &Rig, items: &[MlaItem]) -> Result<Vec<f32>, CudaError> {
        let (cache, blocks) = self.cache();
        let keys: Vec<u32> = self.rows().iter().map(|(at, row)| self.sequences[*at].keys_of(*row) as u32).collect();
        let first_block = self.sequences.iter().scan(0, |next, sequence| {
            *next += sequence.pages() as u32;
            Some(*next - sequence.pages() as u32)
        });
        let first_block = rig.upload(&first_block.collect::<Vec<u32>>());
        let [q, cache_memory] = [&self.q, &cache].map(|values| rig.upload_bf16(values));
        let slots = cache.len() / CACHED;
        let q_map = maps::rows(rig, rig.at(&q), Element::Bf16, (keys.len() * self.heads, CACHED), TILE_ROWS);
        let cache_map = maps::rows(rig, rig.at(&cache_memory), Element::Bf16, (slots, CACHED), TILE_ROWS);
        let (keys_memory, blocks) = (rig.upload(&keys), rig.upload(&blocks));
        let length = keys.len() * self.heads * self.splits() * (2 + LATENT);
        let (items_memory, out) = (rig.upload(items), rig.poisoned::<f32>(length));
        MlaSplits {
            q: rig.at(&q_map),
            cache: rig.at(&cache_map),
            items: rig.at(&items_memory),
            keys: rig.at(&keys_memory),
            first_block: rig.at(&first_block),
            blocks: rig.at(&blocks),
            out: rig.at(&out),
            count: items.len() as u32,
            heads: self.heads as u32,
            splits: self.splits() as u32,
            scale: SCALE,
            running: 2,
        }
        .launch(&rig.driver)?;
        Ok(rig.download(&out, length))
    }

    /// The largest score of one split, the sum of its weights, and the mean of the latents, by definition in f64.
    fn expected(&self, (sequence, row): (usize, usize), q: &[f32], split: usize) -> (f64, f64, Vec<f64>) {
        let end = self.sequences[sequence].keys_of(row).min((split + 1) * SPLIT);
        let keys: Vec<&[f32]> = self.latents[sequence][split * SPLIT * CACHED..end * CACHED].chunks(CACHED).collect();
        let dot = |key: &[f32]| key.iter().zip(q).map(|(key, q)| f64::from(*key) * f64::from(*q)).sum::<f64>();
        let scores: Vec<f64> = keys.iter().map(|key| dot(key) * f64::from(SCALE)).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mean =
            |at: usize| weights.iter().zip(&keys).map(|(weight, key)| weight * f64::from(key[at])).sum::<f64>() / sum;
        (max, sum, (0..LATENT).map(mean).collect())
    }

    fn check(&self, found: &[f32]) {
        let results = found.chunks_exact(2 + LATENT).collect::<Vec<_>>();
        for (at, row) in self.rows().into_iter().enumerate() {
            for head in 0..self.heads {
                let query = at * self.heads + head;
                for split in 0..self.splits() {
                    let what = format!("row {at}, head {head} of {}, split {split}", self.heads);
                    let found = results[query * self.splits() + split];
                    if self.sequences[row.0].keys_of(row.1) <= split * SPLIT {
                        assert!(found.iter().all(|value| value.is_nan()), "{what}: written");
                        continue;
                    }
                    let (max, sum, mean) = self.expected(row, &self.q[query * CACHED..][..CACHED], split);
                    assert!((f64::from(found[0]) - max).abs() < 1e-4, "{what}: {} for a maximum of {max}", found[0]);
                    assert!((f64::from(found[1]) - sum).abs() < 4e-3 * sum, "{what}: {} for a sum of {sum}", found[1]);
                    for (found_latent, mean) in found[2..].iter().zip(mean) {
                        let error = f64::from(found_latent / found[1]) - mean;
                        assert!(error.abs() < 6e-3, "{what}: {found_latent} of {} for {mean}", found[1]);
                    }
                }
            }
        }
    }
}

/// Pages and splits that end anywhere, several rows of a sequence in an item, some of which see a page less than others.
fn cases() -> Vec<Case> {
    vec![
        Case::new(16, &[(1, 1), (1, 70), (5, 66), (1, 64)]),
        Case::new(16, &[(3, 514), (1, 513)]),
        Case::new(20, &[(4, 67)]),
        Case::new(128, &[(2, 65)]),
    ]
}

#[test]
fn splits_are_near_their_definition_whatever_lies_in_other_slots() {
    for case in cases() {
        case.splits_of(1).iter().for_each(|(_, found)| case.check(found));
    }
}

#[test]
fn bits_do_not_depend_on_the_rows_beside_a_row() {
    for case in cases().into_iter().filter(|case| case.heads < 64) {
        let (alone, together) = (case.splits_of(1), case.splits_of(rows_together(case.heads)));
        for ((on, alone), (_, together)) in alone.iter().zip(&together) {
            case.check(together);
            assert!(same_bits(alone, together), "{on}: {} heads", case.heads);
        }
    }
}
