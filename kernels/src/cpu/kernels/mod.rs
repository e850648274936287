//! The inner loops of the CPU device, one set for each instruction set.
//!
//! The loops are written once over lanes of f32 ([`lanes::Lanes`]); an instruction set supplies the lanes and
//! compiles the loops for itself. One that multiplies differently (matrix tiles, dot products of pairs) implements [`Tiles`]
//! with loops of its own.

#[cfg(target_arch = "x86_64")]
#[macro_use]
mod on_lanes;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod dots;
pub(crate) mod e4m3;
mod elementwise;
mod exp;
mod lanes;
mod peak;
mod portable;
mod softmax;
mod steps;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tile_registers;

use super::Isa;
use crate::{Dtype, panels::WIDTH};

/// Rows that a tile takes at most on any instruction set.
pub(super) const TILE_ROWS: usize = 32;

/// Some steps of a few panels, as [`Tiles`] multiply them.
#[derive(Clone, Copy)]
pub(crate) struct Strip<'a, T> {
    /// `[steps / 2][16][2]` each.
    pub(crate) panels: &'a [&'a [T]],
    /// What the products with each panel are multiplied by, once they are summed; none: they are chains that go on.
    pub(crate) scales: Option<&'a [f32]>,
    /// What is fetched meanwhile.
    pub(crate) fetch: Fetch<'a>,
}

/// What is read next and no other tile has seen to.
#[derive(Clone, Copy)]
pub(crate) enum Fetch<'a> {
    /// Nothing, or who knows.
    Nothing,
    /// The next steps of the panels, as few ahead as is best.
    Next,
    /// What lies so many elements behind each panel.
    Ahead(usize),
    /// These, from the first on.
    Rows(&'a [u16]),
}

/// Matrix products of an instruction set, tile by tile: a few packed rows times a few panels. Sizes are those of [`tile`]
/// unless said otherwise.
pub(crate) trait Tiles: Send + Sync {
    /// Rows that one tile takes at most, [`TILE_ROWS`] or fewer.
    fn rows(&self) -> usize {
        tile::ROWS
    }

    /// Panels that a tile of `rows` rows takes at most.
    fn panels(&self, rows: usize) -> usize {
        tile::panels(rows)
    }

    /// Steps along the inner dimension after which another tile is best turned to, while the operands are in the nearest cache;
    /// a multiple of [`crate::panels::STEPS`].
    fn strip(&self) -> usize {
        tile::STRIP
    }

    /// Bytes of packed rows that stay in the second cache beside the panels: these are read from memory once for each block.
    fn block(&self) -> usize {
        tile::BLOCK
    }

    /// Elements of a packed row in the space of one f32.
    fn density(&self) -> usize {
        1
    }

    /// Lays out the rows of one tile, rounded to the type of the inputs, with zeros up to the depth of the panels. Strips lie
    /// of `strip` steps one behind the other: that of step `k` begins at `k · rows / density`.
    fn pack(&self, rows: &[&[f32]], strip: usize, to: &mut [f32]);

    /// `sums[p · R + r] += x[r] · panels[p]` over the steps of a strip, in an order that depends on nothing but the step. With
    /// scales, `sums[p · R + r] += scales[p] · (x[r] · panels[p])`, rounded after each of the three.
    fn tile(&self, x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]);

    /// Whether [`Tiles::tile_bytes`] is the fastest for so many rows; otherwise bytes are brought to bf16.
    fn takes_bytes(&self, rows: usize) -> bool {
        let _ = rows;
        false
    }

    /// As [`Tiles::tile`], of panels in E4M3, whose values are in [`e4m3::UNITS`].
    fn tile_bytes(&self, x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]]) {
        let _ = (x, strip, sums);
        unreachable!("asked for only where it is")
    }
}

/// Products with rows of bf16 that are read where they lie, for as many as [`WIDTH`] others: packing them into panels would take
/// as long as the products. The same sums as those of [`Tiles`] whose inputs are rounded to bf16.
pub(crate) trait InPlace: Send + Sync {
    /// `scores [16, _]` from column `first` on: the products of queries, a panel `[depth / 2][16][2]`, with a multiple of sixteen
    /// rows. `behind`: what is read next.
    fn score(&self, queries: &[u16], rows: RowsInPlace<'_>, behind: &[u16], scores: &mut [f32], first: usize);

    /// `sums[p][w] += weights[w] · rows` for the elements of two panels, from `first` on: a tile of weights, packed for
    /// [`Tiles`], of as many strips of [`crate::panels::STEPS`] rows.
    fn weigh(&self, weights: &[f32], strips: &[RowsInPlace<'_>], first: usize, sums: &mut [[f32; WIDTH]]);
}

/// Rows of bf16 one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct RowsInPlace<'a> {
    pub(crate) data: &'a [u16],
    /// Elements from one to the next.
    pub(crate) stride: usize,
}

/// The inner loops of one instruction set. Each output is summed in an order fixed by its own coordinates.
pub(crate) trait Kernels: Send + Sync {
    /// Products whose inputs are rounded to bf16, or are f32 as they are.
    fn tiles(&self, inputs: Dtype) -> &dyn Tiles;

    /// One row: `out = gain ⊙ x / sqrt(mean(x²) + eps)`.
    fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]);

    /// `out = silu(gate) · up`
    fn swiglu(&self, gate: &[f32; WIDTH], up: &[f32; WIDTH], out: &mut [f32; WIDTH]);

    /// Type that the weights of attention are rounded to before they weigh latents.
    fn weights(&self) -> Dtype;

    /// Products with rows where they lie, if there are some that are faster than packing.
    fn in_place(&self) -> Option<&dyn InPlace>;

    /// Scales scores, replaces them by `exp(score − max)`, and returns `max` and the sum of these.
    fn softmax(&self, scale: f32, scores: &mut [f32]) -> (f32, f32);

    /// Runs `rounds` rounds of multiply-adds from registers, as many at a time as the instruction set can do, and returns
    /// how many they were: nothing is read or written.
    fn multiply_adds(&self, rounds: usize) -> usize;
}

/// Whether this machine has an instruction set, and the operating system lets this process use it.
pub(crate) fn have(isa: Isa) -> bool {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::is_available(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::is_available(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::is_available(),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Amx | Isa::Avx512 | Isa::Avx2 => false,
        Isa::Portable => true,
    }
}

/// The loops of an instruction set that [`have`] has confirmed.
pub(crate) fn of(isa: Isa) -> &'static dyn Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::kernels(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::kernels(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::kernels(),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Amx | Isa::Avx512 | Isa::Avx2 => &portable::Portable,
        Isa::Portable => &portable::Portable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each_isa(check: impl Fn(&dyn Kernels)) {
        Isa::available().into_iter().for_each(|isa| check(of(isa)));
    }

    /// Replaces scores and gives their largest and the sum, by definition.
    fn softmax(scale: f64, scores: &[f32]) -> (Vec<f64>, f64) {
        let scaled: Vec<f64> = scores.iter().map(|score| f64::from(*score) * scale).collect();
        let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (scaled.iter().map(|score| (score - max).exp()).collect(), max)
    }

    #[test]
    fn weights_of_any_number_of_keys() {
        each_isa(|kernels| {
            for count in [1, 2, 7, 8, 9, 16, 61, 512] {
                let scores: Vec<f32> = (0..count).map(|at| (at as f32 * 0.77).sin() * 30.0 - 500.0).collect();
                let (expected, max) = softmax(0.5, &scores);
                let mut found = scores.clone();
                let (found_max, sum) = kernels.softmax(0.5, &mut found);
                assert!((f64::from(found_max) - max).abs() < 1e-4);
                assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-5, "sum of {count}");
                for (found, expected) in found.iter().zip(expected) {
                    assert!((f64::from(*found) / expected - 1.0).abs() < 3e-5, "{found} {expected}");
                }
            }
        });
    }

    #[test]
    fn far_scores_vanish_and_nan_is_seen() {
        each_isa(|kernels| {
            let mut scores = [0.0, -1e30, f32::NEG_INFINITY, -200.0, 0.0, 0.0, 0.0, 0.0, -1e9];
            let (max, sum) = kernels.softmax(1.0, &mut scores);
            assert_eq!((max, sum), (0.0, 5.0));
            assert!(scores[1] < 1e-37 && scores[2] < 1e-37 && scores[8] < 1e-37);
            for at in [0, 7, 8] {
                let mut scores = [1.0; 9];
                scores[at] = f32::NAN;
                assert!(kernels.softmax(1.0, &mut scores).1.is_nan(), "NaN at {at}");
            }
        });
    }

    #[test]
    fn multiply_adds_are_counted() {
        each_isa(|kernels| {
            let one = kernels.multiply_adds(1);
            assert!(one >= 8 && kernels.multiply_adds(1000) == 1000 * one, "{one} a round");
        });
    }

    #[test]
    fn swiglu_over_the_whole_range() {
        each_isa(|kernels| {
            for base in [-200.0f32, -90.0, -88.0, -10.0, -1.0, 0.0, 1.0, 20.0, 87.0, 300.0] {
                let gate: [f32; WIDTH] = std::array::from_fn(|at| base + at as f32 * 0.37);
                let up: [f32; WIDTH] = std::array::from_fn(|at| 1.0 - at as f32 * 0.2);
                let mut out = [f32::NAN; WIDTH];
                kernels.swiglu(&gate, &up, &mut out);
                for ((gate, up), out) in gate.iter().zip(up).zip(out) {
                    let (gate, up) = (f64::from(*gate), f64::from(up));
                    let expected = gate / (1.0 + (-gate).exp()) * up;
                    let error = (f64::from(out) - expected).abs();
                    assert!(error <= expected.abs() * 1e-6 + 1e-34, "{gate} {up}: {out}, expected {expected}");
                }
            }
            let mut out = [0.0; WIDTH];
            kernels.swiglu(&[f32::NAN; WIDTH], &[1.0; WIDTH], &mut out);
            assert!(out.iter().all(|out| out.is_nan()));
        });
    }
}
