//! Products with AVX-512 BF16: dot products of pairs.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::{arch::x86_64::*, hint::black_box, mem::transmute};

use super::{Strip, Tiles, e4m3::Lookups, steps};
use crate::{
    activation,
    panels::{PAIRS, STEPS, WIDTH},
};

/// Rows that one tile takes at most.
const ROWS: usize = 12;
/// Steps of a strip: two panels of so many and a block of rows lie in the second cache together, from where they come as fast
/// as they are multiplied.
const STRIP: usize = 2048;
/// Up to so many rows, bytes that are looked up by every tile are faster than those that are brought to bf16 once.
const BYTES_ROWS: usize = 4 * ROWS;
/// Words of 32 bits, each a pair of steps, from one packed row to the next.
const ROW: usize = STEPS / 2;

/// Products of inputs rounded to bf16, for machines that have AVX-512 with BF16. Nothing is fetched: the processor sees by itself
/// what is read next. A pair of steps is added to each sum as
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
            unsafe { by_rows(&InBf16, x, strip, sums, rows) }
        });
    }

    fn takes_bytes(&self, rows: usize) -> bool {
        rows <= BYTES_ROWS && Lookups::are_available()
    }

    fn tile_bytes(&self, x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]]) {
        let rows = steps::check(2 * x.len(), strip, sums);
        compiled!("avx512f,avx512bw,avx512vbmi,avx512bf16", fn(x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]], rows: usize) {
            // SAFETY: compiled for AVX-512 with BF16 and VBMI, asked for where both are; the lengths have been checked.
            unsafe { by_rows(&Lookups::new(), x, strip, sums, rows) }
        });
    }
}

/// Panels that are taken together with so many rows: as many sums as fit into registers beside the weights.
const fn panels(rows: usize) -> usize {
    match rows {
        ..=6 => 4,
        ..=9 => 3,
        _ => 2,
    }
}

/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn by_rows<W: Weights<N>, const N: usize>(
    w: &W,
    x: &[f32],
    strip: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
    rows: usize,
) {
    // SAFETY: the contract of this function.
    unsafe {
        match rows {
            1 => groups::<W, N, 1, { panels(1) }>(w, x, strip, sums),
            2 => groups::<W, N, 2, { panels(2) }>(w, x, strip, sums),
            3 => groups::<W, N, 3, { panels(3) }>(w, x, strip, sums),
            4 => groups::<W, N, 4, { panels(4) }>(w, x, strip, sums),
            5 => groups::<W, N, 5, { panels(5) }>(w, x, strip, sums),
            6 => groups::<W, N, 6, { panels(6) }>(w, x, strip, sums),
            7 => groups::<W, N, 7, { panels(7) }>(w, x, strip, sums),
            8 => groups::<W, N, 8, { panels(8) }>(w, x, strip, sums),
            9 => groups::<W, N, 9, { panels(9) }>(w, x, strip, sums),
            10 => groups::<W, N, 10, { panels(10) }>(w, x, strip, sums),
            11 => groups::<W, N, 11, { panels(11) }>(w, x, strip, sums),
            12 => groups::<W, N, 12, { panels(12) }>(w, x, strip, sums),
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// Weights as they lie in panels, brought to pairs of bf16 for sixteen outputs, `N` pairs of steps at a time.
trait Weights<const N: usize> {
    /// One weight.
    type Element: Copy;

    /// # Safety
    /// As for [`multiply`]; `N` pairs for each of sixteen outputs lie there.
    unsafe fn load(&self, from: *const Self::Element) -> [__m512bh; N];
}

/// Weights in bf16.
struct InBf16;

impl Weights<1> for InBf16 {
    type Element = u16;

    #[inline(always)]
    unsafe fn load(&self, from: *const u16) -> [__m512bh; 1] {
        // SAFETY: the caller's.
        [pairs(unsafe { _mm512_loadu_si512(from.cast()) })]
    }
}

impl Weights<2> for Lookups {
    type Element = u8;

    #[inline(always)]
    unsafe fn load(&self, from: *const u8) -> [__m512bh; 2] {
        // SAFETY: the caller's.
        unsafe { self.widen(from) }.map(pairs)
    }
}

/// Takes the panels `P` at a time, and then, at the end of a matrix, one at a time.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn groups<W: Weights<N>, const N: usize, const R: usize, const P: usize>(
    w: &W,
    x: &[f32],
    Strip { panels, scales, .. }: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
) {
    let (groups, rest) = panels.as_chunks::<P>();
    let (of_groups, of_rest) = sums.split_at_mut(groups.len() * P * R);
    let scales = |first: usize, count: usize| scales.map(|scales| &scales[first..][..count]);
    // SAFETY: the contract of this function.
    unsafe {
        for (group, (panels, sums)) in groups.iter().zip(of_groups.chunks_exact_mut(P * R)).enumerate() {
            multiply::<W, N, R, P>(w, x, panels, scales(group * P, P), sums);
        }
        for (index, (panel, sums)) in rest.iter().zip(of_rest.chunks_exact_mut(R)).enumerate() {
            multiply::<W, N, R, 1>(w, x, &[panel], scales(groups.len() * P + index, 1), sums);
        }
    }
}

/// `sums[p · R + r] += x[r] · panels[p]`, with scales from zero, then times these. `x [depth / 32][R][32]`, panels
/// `[depth / 2][16][2]`.
///
/// # Safety
/// The caller is compiled for AVX-512 with BF16, and what `W` needs; `R` packed rows, panels of as many steps, `R · P` sums,
/// `P` scales.
#[inline(always)]
unsafe fn multiply<W: Weights<N>, const N: usize, const R: usize, const P: usize>(
    w: &W,
    x: &[f32],
    panels: &[&[W::Element]; P],
    scales: Option<&[f32]>,
    sums: &mut [[f32; WIDTH]],
) {
    let strips = x.len() / (R * ROW);
    // SAFETY: `strip` stays below the number of strips; each has sixteen pairs of steps, of 32 weights in each panel.
    unsafe {
        let mut totals = [[_mm512_setzero_ps(); P]; R];
        if scales.is_none() {
            for r in 0..R {
                for p in 0..P {
                    totals[r][p] = _mm512_loadu_ps(sums[p * R + r].as_ptr());
                }
            }
        }
        for strip in 0..strips {
            let x = x.as_ptr().add(strip * R * ROW);
            for pair in (0..ROW).step_by(N) {
                let at = (strip * ROW + pair) * PAIRS;
                let mut weights = [[pairs(_mm512_setzero_si512()); N]; P];
                for p in 0..P {
                    weights[p] = w.load(panels[p].as_ptr().add(at));
                }
                for n in 0..N {
                    for r in 0..R {
                        let x = pairs(_mm512_castps_si512(_mm512_set1_ps(*x.add(r * ROW + pair + n))));
                        for p in 0..P {
                            totals[r][p] = _mm512_dpbf16_ps(totals[r][p], weights[p][n], x);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                let sum = sums[p * R + r].as_mut_ptr();
                let total = match scales {
                    None => totals[r][p],
                    Some(scales) => {
                        _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_mul_ps(_mm512_set1_ps(scales[p]), totals[r][p]))
                    }
                };
                _mm512_storeu_ps(sum, total);
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
