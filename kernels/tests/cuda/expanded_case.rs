//! Rows of one sequence over its expanded keys and values: numbers, and the definition in f64.

use crate::numbers::Numbers;

const PAGE: usize = 64;
pub(crate) const SCALE: f32 = 0.11;

/// Sizes: `rows` rows of a sequence, the first at `position`.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
    pub(crate) latent: usize,
    pub(crate) position: usize,
    pub(crate) rows: usize,
}

/// The same with numbers, all of bf16.
pub(crate) struct Filled {
    pub(crate) sizes: Sizes,
    /// `[n, R, dn + dr]`
    pub(crate) q: Vec<f32>,
    /// `[K, n, dn + dv]`
    pub(crate) kv: Vec<f32>,
    /// `[slots, r + dr]`: NaN in every slot of no position, and in every latent.
    pub(crate) cache: Vec<f32>,
    /// Of the sequence.
    pub(crate) blocks: Vec<u32>,
}

impl Sizes {
    pub(crate) fn keys(&self) -> usize {
        self.position + self.rows
    }

    pub(crate) fn fill(self, seed: u64) -> Filled {
        let mut numbers = Numbers::new(seed);
        let pages = self.keys().div_ceil(PAGE);
        let blocks = numbers.distinct(pages, pages as u32 + 2);
        let width = self.latent + self.rope;
        let mut cache = vec![f32::NAN; (pages + 2) * PAGE * width];
        for position in 0..self.keys() {
            let slot = blocks[position / PAGE] as usize * PAGE + position % PAGE;
            cache[slot * width + self.latent..][..self.rope].copy_from_slice(&numbers.rounded(self.rope, 1.0));
        }
        let q = numbers.rounded(self.heads * self.rows * (self.nope + self.rope), 1.0);
        let kv = numbers.rounded(self.keys() * self.heads * (self.nope + self.value), 1.0);
        Filled { sizes: self, q, kv, cache, blocks }
    }
}

impl Filled {
    /// Means of the values that a row sees, by definition: `[dv]`.
    fn expected(&self, row: usize, head: usize) -> Vec<f64> {
        let Sizes { heads, nope, rope, value, latent, position, rows, .. } = self.sizes;
        let q = &self.q[(head * rows + row) * (nope + rope)..][..nope + rope];
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let kv = |key: usize| &self.kv[(key * heads + head) * (nope + value)..][..nope + value];
        let score = |key: usize| {
            let slot = self.blocks[key / PAGE] as usize * PAGE + key % PAGE;
            let roped = &self.cache[slot * (latent + rope) + latent..][..rope];
            (dot(&q[..nope], &kv(key)[..nope]) + dot(&q[nope..], roped)) * f64::from(SCALE)
        };
        let scores: Vec<f64> = (0..=position + row).map(score).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mean = |at: usize| {
            weights.iter().enumerate().map(|(key, weight)| weight * f64::from(kv(key)[nope + at])).sum::<f64>() / sum
        };
        (0..value).map(mean).collect()
    }

    /// Whether sums `[R, n, 2 + dv]` hold the means, within `limit`.
    pub(crate) fn check(&self, sums: &[f32], limit: f64) {
        let Sizes { heads, value, .. } = self.sizes;
        for (at, found) in sums.chunks_exact(2 + value).enumerate() {
            let (row, head) = (at / heads, at % heads);
            for (i, expected) in self.expected(row, head).into_iter().enumerate() {
                let mean = f64::from(found[2 + i]) / f64::from(found[1]);
                assert!((mean - expected).abs() < limit, "row {row}, head {head}, {i}: {mean} for {expected}");
            }
        }
    }
}
