//! Products with AVX-512: dot products of bf16 pairs, and multiply-adds where the inputs stay f32. All else runs on the
//! lanes of AVX2.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::{arch::x86_64::*, hint::black_box, mem::transmute};

use super::{
    Kernels, Tiles,
    avx2::{self, Avx2},
    steps,
};
use crate::{
    Dtype,
    panels::{PAIRS, STEPS, WIDTH},
};

/// Rows that one tile takes at most.
const ROWS: usize = 8;
/// Steps of a strip: eight packed rows and three panels of so many lie in the nearest cache together.
const STRIP: usize = 256;

/// Whether this machine has what the products and all other loops are compiled for.
pub(super) fn is_available() -> bool {
    avx2::is_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// The loops for AVX-512 with BF16.
///
/// # Panics
/// When the machine lacks either.
pub(super) fn kernels() -> &'static dyn Kernels {
    // SAFETY: handed out below, where AVX2, FMA and AVX-512 have been found.
    static KERNELS: Avx2 = unsafe { Avx2::beside(tiles, multiply_adds) };
    assert!(is_available(), "AVX-512 with BF16");
    &KERNELS
}

/// Products of inputs of a type, for machines that have AVX-512 with BF16.
pub(super) fn tiles(inputs: Dtype) -> &'static dyn Tiles {
    match inputs {
        Dtype::Bf16 => &Dots,
        Dtype::F32 => &MultiplyAdds,
    }
}

/// Products of inputs rounded to bf16. A pair of steps is added to each sum as `sum + x₁w₁ + x₀w₀`, from left to right,
/// rounded after each, with denormal numbers taken as zero.
struct Dots;

/// Products of f32 inputs: one chain of fused multiply-adds for each output, ascending.
struct MultiplyAdds;

// SAFETY (of all calls inside `compiled!`): these run with AVX-512 and BF16; the loops check the lengths of their slices.
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

    fn pack(&self, rows: &[&[f32]], to: &mut [f32]) {
        compiled!("avx512f,avx512bw", fn(rows: &[&[f32]], to: &mut [f32]) {
            steps::pack::<u16>(rows, bytemuck::cast_slice_mut(to));
        });
    }

    fn tile(&self, x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
        compiled!("avx512f,avx512bf16", fn(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
            // SAFETY: see above.
            unsafe { tile::<Dots>(x, panels, sums) }
        });
    }
}

impl Tiles for MultiplyAdds {
    fn rows(&self) -> usize {
        ROWS
    }

    fn panels(&self, rows: usize) -> usize {
        panels(rows)
    }

    fn strip(&self) -> usize {
        STRIP
    }

    fn pack(&self, rows: &[&[f32]], to: &mut [f32]) {
        steps::pack::<f32>(rows, to);
    }

    fn tile(&self, x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
        compiled!("avx512f", fn(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
            // SAFETY: see above.
            unsafe { tile::<MultiplyAdds>(x, panels, sums) }
        });
    }
}

/// Panels of a tile of `rows` rows: as many sums as fit into registers beside the weights.
fn panels(rows: usize) -> usize {
    if rows > 6 { 3 } else { 4 }
}

/// How sums grow by a pair of steps.
trait Pair {
    /// Words of 32 bits that a packed row has for a pair.
    const WORDS: usize;

    /// Adds to the sums of `R` rows and `P` panels. `x`: the first row's words of a pair; each other row's lie
    /// [`STEPS`] steps after those of the row before.
    ///
    /// # Safety
    /// The caller has AVX-512 with BF16, is compiled for what the implementation needs, and vouches for `R` rows.
    unsafe fn add<const R: usize, const P: usize>(x: *const f32, weights: &[__m512i; P], sums: &mut [[__m512; P]; R]);
}

/// Words from one packed row to the next.
const fn words_of_row<T: Pair>() -> usize {
    STEPS / 2 * T::WORDS
}

/// The same bits as pairs of bf16.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: vectors of one size, of which any bits are valid.
    unsafe { transmute(bits) }
}

impl Pair for Dots {
    const WORDS: usize = 1;

    #[inline(always)]
    unsafe fn add<const R: usize, const P: usize>(x: *const f32, weights: &[__m512i; P], sums: &mut [[__m512; P]; R]) {
        // SAFETY: the contract of this function.
        unsafe {
            for r in 0..R {
                let x = pairs(_mm512_castps_si512(_mm512_set1_ps(*x.add(r * words_of_row::<Self>()))));
                for p in 0..P {
                    sums[r][p] = _mm512_dpbf16_ps(sums[r][p], pairs(weights[p]), x);
                }
            }
        }
    }
}

impl Pair for MultiplyAdds {
    const WORDS: usize = 2;

    #[inline(always)]
    unsafe fn add<const R: usize, const P: usize>(x: *const f32, weights: &[__m512i; P], sums: &mut [[__m512; P]; R]) {
        // SAFETY: the contract of this function.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            let first = weights.map(|weights| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(weights)));
            let second = weights.map(|weights| _mm512_castsi512_ps(_mm512_and_si512(weights, high)));
            for (step, weights) in [first, second].iter().enumerate() {
                for r in 0..R {
                    let x = _mm512_set1_ps(*x.add(r * words_of_row::<Self>() + step));
                    for p in 0..P {
                        sums[r][p] = _mm512_fmadd_ps(weights[p], x, sums[r][p]);
                    }
                }
            }
        }
    }
}

/// `sums[p · R + r] += x[r] · panels[p]`. `x [depth / 32][R][32]`, panels `[depth / 2][16][2]`.
///
/// # Safety
/// As for [`Pair::add`].
#[inline(always)]
unsafe fn tile<T: Pair>(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
    let rows = steps::check(x.len() * 2 / T::WORDS, panels, sums);
    // SAFETY: the lengths have been checked.
    unsafe {
        match rows {
            1 => groups::<T, 1, 4>(x, panels, sums),
            2 => groups::<T, 2, 4>(x, panels, sums),
            3 => groups::<T, 3, 4>(x, panels, sums),
            4 => groups::<T, 4, 4>(x, panels, sums),
            5 => groups::<T, 5, 4>(x, panels, sums),
            6 => groups::<T, 6, 4>(x, panels, sums),
            7 => groups::<T, 7, 3>(x, panels, sums),
            8 => groups::<T, 8, 3>(x, panels, sums),
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// Takes the panels `P` at a time, and then, at the end of a matrix, one at a time.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn groups<T: Pair, const R: usize, const P: usize>(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
    let (groups, rest) = panels.as_chunks::<P>();
    let (of_groups, of_rest) = sums.split_at_mut(groups.len() * P * R);
    // SAFETY: the contract of this function.
    unsafe {
        for (panels, sums) in groups.iter().zip(of_groups.chunks_exact_mut(P * R)) {
            multiply::<T, R, P>(x, panels, sums);
        }
        for (panel, sums) in rest.iter().zip(of_rest.chunks_exact_mut(R)) {
            multiply::<T, R, 1>(x, &[panel], sums);
        }
    }
}

/// # Safety
/// As for [`Pair::add`]; `R` packed rows, panels of as many steps, `R · P` sums.
#[inline(always)]
unsafe fn multiply<T: Pair, const R: usize, const P: usize>(
    x: &[f32],
    panels: &[&[u16]; P],
    sums: &mut [[f32; WIDTH]],
) {
    let strips = x.len() / (R * words_of_row::<T>());
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
            let x = x.as_ptr().add(strip * R * words_of_row::<T>());
            for pair in 0..STEPS / 2 {
                let at = (strip * STEPS / 2 + pair) * PAIRS;
                let mut weights = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    weights[p] = _mm512_loadu_si512(panels[p].as_ptr().add(at).cast());
                    _mm_prefetch::<_MM_HINT_T0>(panels[p].as_ptr().wrapping_add(ahead + at).cast());
                }
                T::add(x.add(pair * T::WORDS), &weights, &mut totals);
            }
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(sums[p * R + r].as_mut_ptr(), totals[r][p]);
            }
        }
    }
}

/// Dot products of pairs from registers: see [`Kernels::multiply_adds`].
fn multiply_adds(rounds: usize) -> usize {
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
