//! Products with AVX-512 BF16: dot products of pairs.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::{arch::x86_64::*, hint::black_box, mem::transmute};

use super::{Fetch, Strip, Tiles, steps};
use crate::{
    activation,
    panels::{PAIRS, STEPS, WIDTH},
    scratch::Scratch,
};

/// Rows that one tile takes at most.
const ROWS: usize = 8;
/// Steps of a strip: eight packed rows and three panels of so many lie in the nearest cache together.
const STRIP: usize = 256;
/// Words of 32 bits, each a pair of steps, from one packed row to the next.
const ROW: usize = STEPS / 2;

/// Products of inputs rounded to bf16, for machines that have AVX-512 with BF16. A pair of steps is added to each sum as
/// `sum + x₁w₁ + x₀w₀`, from left to right, rounded after each, with denormal numbers taken as zero.
pub(super) struct Dots;

impl Tiles for Dots {
    fn rows(&self) -> usize {
        ROWS
    }

    /// As many sums as fit into registers beside the weights.
    fn panels(&self, rows: usize) -> usize {
        if rows > 6 { 3 } else { 4 }
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
        let Strip { panels, scales, fetch } = strip;
        let fetch = matches!(fetch, Fetch::Panels);
        let rows = steps::check(2 * x.len(), strip, sums);
        scaled(scales, sums, |sums| {
            compiled!("avx512f,avx512bf16", fn(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]], rows: usize, fetch: bool) {
                // SAFETY: compiled for AVX-512 with BF16; the lengths have been checked.
                unsafe {
                    match fetch {
                        true => by_rows::<true>(x, panels, sums, rows),
                        false => by_rows::<false>(x, panels, sums, rows),
                    }
                }
            });
        });
    }
}

/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn by_rows<const FETCH: bool>(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]], rows: usize) {
    // SAFETY: the contract of this function.
    unsafe {
        match rows {
            1 => groups::<1, 4, FETCH>(x, panels, sums),
            2 => groups::<2, 4, FETCH>(x, panels, sums),
            3 => groups::<3, 4, FETCH>(x, panels, sums),
            4 => groups::<4, 4, FETCH>(x, panels, sums),
            5 => groups::<5, 4, FETCH>(x, panels, sums),
            6 => groups::<6, 4, FETCH>(x, panels, sums),
            7 => groups::<7, 3, FETCH>(x, panels, sums),
            8 => groups::<8, 3, FETCH>(x, panels, sums),
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// Runs `add`, which adds products to sums, on parts from zero; these, times the scales of their panels, are then added to
/// `sums [panels][rows]`. Without scales, on the sums themselves.
pub(super) fn scaled(scales: Option<&[f32]>, sums: &mut [[f32; WIDTH]], add: impl FnOnce(&mut [[f32; WIDTH]])) {
    let Some(scales) = scales else { return add(sums) };
    let mut parts = Scratch::take(sums.as_flattened().len());
    parts.fill(0.0);
    add(parts.as_chunks_mut().0);
    let sums = sums.as_flattened_mut();
    let of_panel = sums.len() / scales.len().max(1);
    for ((sums, parts), scale) in sums.chunks_exact_mut(of_panel).zip(parts.chunks_exact(of_panel)).zip(scales) {
        sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += scale * part);
    }
}

/// Takes the panels `P` at a time, and then, at the end of a matrix, one at a time.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn groups<const R: usize, const P: usize, const FETCH: bool>(
    x: &[f32],
    panels: &[&[u16]],
    sums: &mut [[f32; WIDTH]],
) {
    let (groups, rest) = panels.as_chunks::<P>();
    let (of_groups, of_rest) = sums.split_at_mut(groups.len() * P * R);
    // SAFETY: the contract of this function.
    unsafe {
        for (panels, sums) in groups.iter().zip(of_groups.chunks_exact_mut(P * R)) {
            multiply::<R, P, FETCH>(x, panels, sums);
        }
        for (panel, sums) in rest.iter().zip(of_rest.chunks_exact_mut(R)) {
            multiply::<R, 1, FETCH>(x, &[panel], sums);
        }
    }
}

/// `sums[p · R + r] += x[r] · panels[p]`. `x [depth / 32][R][32]`, panels `[depth / 2][16][2]`.
///
/// # Safety
/// The caller is compiled for AVX-512 with BF16; `R` packed rows, panels of as many steps, `R · P` sums.
#[inline(always)]
unsafe fn multiply<const R: usize, const P: usize, const FETCH: bool>(
    x: &[f32],
    panels: &[&[u16]; P],
    sums: &mut [[f32; WIDTH]],
) {
    let strips = x.len() / (R * ROW);
    let ahead = strips * STEPS / 2 * PAIRS;
    // SAFETY: `strip` stays below the number of strips; each has sixteen pairs of steps, of 32 weights in each panel. A
    // prefetch may name any address.
    unsafe {
        let mut totals = [[_mm512_setzero_ps(); P]; R];
        for r in 0..R {
            for p in 0..P {
                totals[r][p] = _mm512_loadu_ps(sums[p * R + r].as_ptr());
            }
        }
        for strip in 0..strips {
            let x = x.as_ptr().add(strip * R * ROW);
            for pair in 0..ROW {
                let at = (strip * ROW + pair) * PAIRS;
                let mut weights = [pairs(_mm512_setzero_si512()); P];
                for p in 0..P {
                    weights[p] = pairs(_mm512_loadu_si512(panels[p].as_ptr().add(at).cast()));
                    if FETCH {
                        _mm_prefetch::<_MM_HINT_T0>(panels[p].as_ptr().wrapping_add(ahead + at).cast());
                    }
                }
                for r in 0..R {
                    let x = pairs(_mm512_castps_si512(_mm512_set1_ps(*x.add(r * ROW + pair))));
                    for p in 0..P {
                        totals[r][p] = _mm512_dpbf16_ps(totals[r][p], weights[p], x);
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(sums[p * R + r].as_mut_ptr(), totals[r][p]);
            }
        }
    }
}

/// The same bits as pairs of bf16.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: vectors of one size, of which any bits are valid.
    unsafe { transmute(bits) }
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
