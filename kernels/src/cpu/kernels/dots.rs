//! Products with AVX-512 BF16: dot products of pairs.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

mod in_place;
mod tile;

use std::{arch::x86_64::*, hint::black_box, mem::transmute};

use tile::InBf16;

use super::{Strip, Tiles, e4m3::Lookups, steps};
use crate::{
    activation,
    panels::{STEPS, WIDTH},
};

/// Rows that one tile takes at most.
const ROWS: usize = 12;
/// Steps of a strip: two panels of so many and a block of rows lie in the second cache together, from where they come as fast
/// as they are multiplied.
const STRIP: usize = 2048;
/// Up to so many rows, bytes that are looked up by every tile are faster than those that are brought to bf16 once.
const BYTES_ROWS: usize = 4 * ROWS;

/// Products of inputs rounded to bf16, for machines that have AVX-512 with BF16. Panels are not fetched: the processor sees by
/// itself what is read next. A pair of steps is added to each sum as
/// `sum + x₁w₁ + x₀w₀`, from left to right, rounded after each, with denormal numbers taken as zero.
pub(super) struct Dots;

impl Tiles for Dots {
    fn rows(&self) -> usize {
        ROWS
    }

    fn panels(&self, rows: usize) -> usize {
        panels(rows)
    }

    fn strip(&self) -> usize {
        STRIP
    }

    fn density(&self) -> usize {
        2
    }

    /// The same for all strips.
    fn pack(&self, rows: &[&[f32]], _: usize, to: &mut [f32]) {
        compiled!("avx512f,avx512bw", fn(rows: &[&[f32]], to: &mut [f32]) {
            steps::pack(rows, STEPS, bytemuck::cast_slice_mut(to), |row, to: &mut [u16]| {
                to.iter_mut().zip(row).for_each(|(to, x)| *to = activation::to_bf16(*x));
            });
        });
    }

    fn tile(&self, x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
        let rows = steps::check(2 * x.len(), strip, sums);
        compiled!("avx512f,avx512bf16", fn(x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]], rows: usize) {
            // SAFETY: compiled for AVX-512 with BF16; the lengths have been checked.
            unsafe { tile::tile(&InBf16, x, strip, sums, rows) }
        });
    }

    fn takes_bytes(&self, rows: usize) -> bool {
        rows <= BYTES_ROWS && Lookups::are_available()
    }

    fn tile_bytes(&self, x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]]) {
        let rows = steps::check(2 * x.len(), strip, sums);
        compiled!("avx512f,avx512bw,avx512vbmi,avx512bf16", fn(x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]], rows: usize) {
            // SAFETY: compiled for AVX-512 with BF16 and VBMI, asked for where both are; the lengths have been checked.
            unsafe { tile::tile(&Lookups::new(), x, strip, sums, rows) }
        });
    }
}

/// The same bits as pairs of bf16.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: vectors of one size, of which any bits are valid.
    unsafe { transmute(bits) }
}

/// Panels that are taken together with so many rows: as many sums as fit into registers beside the weights.
const fn panels(rows: usize) -> usize {
    match rows {
        0..=6 => 4,
        7..=9 => 3,
        _ => 2,
    }
}

/// Dot products of pairs from registers: see [`super::Kernels::multiply_adds`].
pub(super) fn multiply_adds(rounds: usize) -> usize {
    /// Independent sums, enough of them to hide the latency of one.
    const CHAINS: usize = 16;
    compiled!("avx512f,avx512bf16", fn(rounds: usize) -> usize {
        // Opaque, so that nothing is worked out beforehand: 1 and −1, times one and the same, change no sum.
        let (x, w) = (_mm512_set1_epi32(black_box(0x3f80_3f80)), _mm512_set1_epi32(black_box(0x3f80_bf80)));
        let (x, w) = (pairs(x), pairs(w));
        let mut sums = [_mm512_set1_ps(black_box(1.0)); CHAINS];
        for _ in 0..rounds {
            for chain in 0..CHAINS {
                sums[chain] = _mm512_dpbf16_ps(sums[chain], w, x);
            }
        }
        black_box(sums);
        rounds * CHAINS * 2 * WIDTH
    })
}
