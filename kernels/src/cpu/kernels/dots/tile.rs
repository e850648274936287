//! One tile: a few packed rows times a few panels, with all sums in registers.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::{arch::x86_64::*, ops::Range};

use super::{
    super::{Fetch, Strip, e4m3::Lookups},
    pairs, panels,
};
use crate::panels::{PAIRS, STEPS, WIDTH};

/// Words of 32 bits, each a pair of steps, from one packed row to the next.
const ROW: usize = STEPS / 2;

/// Weights as they lie in panels, brought to pairs of bf16 for sixteen outputs, `N` pairs of steps at a time.
pub(super) trait Weights<const N: usize> {
    /// One weight.
    type Element: Copy;

    /// # Safety
    /// As for [`tile`]; `N` pairs for each of sixteen outputs lie there.
    unsafe fn load(&self, from: *const Self::Element) -> [__m512bh; N];
}

/// Weights in bf16.
pub(super) struct InBf16;

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

/// As [`super::super::Tiles::tile`], of so many rows.
///
/// # Safety
/// The caller is compiled for AVX-512 with BF16, and what `W` needs; the lengths have been checked.
#[inline(always)]
pub(super) unsafe fn tile<W: Weights<N>, const N: usize>(
    w: &W,
    x: &[f32],
    strip: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
    rows: usize,
) {
    // SAFETY: the contract of this function.
    unsafe {
        match strip.fetch {
            Fetch::Ahead(_) | Fetch::Rows(_) => by_rows::<W, N, true>(w, x, strip, sums, rows),
            Fetch::Nothing | Fetch::Next => by_rows::<W, N, false>(w, x, strip, sums, rows),
        }
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn by_rows<W: Weights<N>, const N: usize, const FETCH: bool>(
    w: &W,
    x: &[f32],
    strip: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
    rows: usize,
) {
    // SAFETY: the contract of this function.
    unsafe {
        match rows {
            1 => of::<W, N, 1, { panels(1) }, FETCH>(w, x, strip, sums),
            2 => of::<W, N, 2, { panels(2) }, FETCH>(w, x, strip, sums),
            3 => of::<W, N, 3, { panels(3) }, FETCH>(w, x, strip, sums),
            4 => of::<W, N, 4, { panels(4) }, FETCH>(w, x, strip, sums),
            5 => of::<W, N, 5, { panels(5) }, FETCH>(w, x, strip, sums),
            6 => of::<W, N, 6, { panels(6) }, FETCH>(w, x, strip, sums),
            7 => of::<W, N, 7, { panels(7) }, FETCH>(w, x, strip, sums),
            8 => of::<W, N, 8, { panels(8) }, FETCH>(w, x, strip, sums),
            9 => of::<W, N, 9, { panels(9) }, FETCH>(w, x, strip, sums),
            10 => of::<W, N, 10, { panels(10) }, FETCH>(w, x, strip, sums),
            11 => of::<W, N, 11, { panels(11) }, FETCH>(w, x, strip, sums),
            12 => of::<W, N, 12, { panels(12) }, FETCH>(w, x, strip, sums),
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// Takes the panels `P` at a time, and then, at the end of a matrix, one at a time.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn of<W: Weights<N>, const N: usize, const R: usize, const P: usize, const FETCH: bool>(
    w: &W,
    x: &[f32],
    strip: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
) {
    let (mut first, mut rest) = (0, sums);
    while first < strip.panels.len() {
        let count = if strip.panels.len() - first < P { 1 } else { P };
        let part = part(strip, first..first + count);
        let sums = rest.split_off_mut(..count * R).expect("sums of every panel");
        // SAFETY: the contract of this function; so many panels and sums.
        unsafe {
            match count {
                1 => multiply::<W, N, R, 1, FETCH>(w, x, part, sums),
                _ => multiply::<W, N, R, P, FETCH>(w, x, part, sums),
            }
        }
        first += count;
    }
}

/// Some panels of a strip; of the rows that are fetched, as many as lie in so many panels.
fn part<'a, T>(strip: Strip<'a, T>, of: Range<usize>) -> Strip<'a, T> {
    let fetch = match strip.fetch {
        Fetch::Rows(rows) => Fetch::Rows(rows.get(of.start * strip.panels[0].len()..).unwrap_or_default()),
        fetch => fetch,
    };
    Strip { panels: &strip.panels[of.clone()], scales: strip.scales.map(|scales| &scales[of]), fetch }
}

/// `sums[p · R + r] += x[r] · panels[p]`, with scales from zero, then times these. `x [depth / 32][R][32]`, panels
/// `[depth / 2][16][2]`.
///
/// # Safety
/// As for [`tile`]; `R` rows, `P` panels.
#[inline(always)]
unsafe fn multiply<W: Weights<N>, const N: usize, const R: usize, const P: usize, const FETCH: bool>(
    w: &W,
    x: &[f32],
    Strip { panels, scales, fetch }: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
) {
    let mut behind = [std::ptr::null::<u8>(); P];
    for p in 0..P {
        behind[p] = match fetch {
            Fetch::Rows(rows) => rows.as_ptr().wrapping_add(p * panels[0].len()).cast(),
            Fetch::Ahead(elements) => panels[p].as_ptr().wrapping_add(elements).cast(),
            _ => std::ptr::null(),
        };
    }
    let strips = x.len() / (R * ROW);
    // SAFETY: `strip` stays below the number of strips; each has sixteen pairs of steps, of 32 weights in each panel. A
    // prefetch may name any address.
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
                    if FETCH {
                        _mm_prefetch::<_MM_HINT_T1>(behind[p].wrapping_add(at * size_of::<W::Element>()).cast());
                    }
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
