//! Tiles of a matrix product over lanes of f32: a few rows times a few panels, with all sums in registers.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::hint::black_box;

use super::{Fetch, Strip, elementwise::round, lanes::Lanes, steps};
use crate::{
    Dtype,
    panels::{PAIRS, WIDTH},
};

/// Rows that one tile takes at most.
pub(super) const ROWS: usize = 6;
/// Steps of a strip: six packed rows and a panel of so many lie in the nearest cache together.
pub(super) const STRIP: usize = 512;
/// How far ahead panels are fetched, in elements of each.
const AHEAD: usize = 2048;
/// The cases of [`Fetch`].
const NOTHING: u8 = 0;
const NEXT: u8 = 1;
const BEHIND: u8 = 2;
/// Pairs of steps in one round of the loop.
const UNROLLED: usize = 2;
/// Bytes of packed rows that are taken together.
pub(super) const BLOCK: usize = 256 << 10;

/// Panels that a tile of `rows` rows takes at most: as many sums as fit into registers, and enough to hide the latency
/// of one chain of additions behind the others.
pub(super) fn panels(rows: usize) -> usize {
    match rows {
        1 => 4,
        2 => 2,
        _ => 1,
    }
}

/// Lays out rows for [`tile`] strip by strip, rounded to the type of the inputs.
#[inline(always)]
pub(super) fn pack(inputs: Dtype, rows: &[&[f32]], strip: usize, to: &mut [f32]) {
    match inputs {
        Dtype::Bf16 => steps::pack(rows, strip, to, round),
        Dtype::F32 => steps::pack(rows, strip, to, |row, to| to.copy_from_slice(row)),
    }
}

/// Weights as they lie in panels, and lanes of their values: sixteen outputs in `V` vectors.
pub(super) trait Weights<L, const V: usize> {
    /// One weight.
    type Element: Copy;

    /// Those of the first step of a pair, or of the second.
    ///
    /// # Safety
    /// As for [`Lanes`]; a pair for each of sixteen outputs lies there.
    unsafe fn load<const SECOND: bool>(from: *const Self::Element) -> [L; V];
}

/// Weights in bf16.
pub(super) struct InBf16;

impl<L: Lanes, const V: usize> Weights<L, V> for InBf16 {
    type Element = u16;

    #[inline(always)]
    unsafe fn load<const SECOND: bool>(from: *const u16) -> [L; V] {
        // SAFETY: the caller's.
        unsafe {
            let mut all = [L::splat(0.0); V];
            for v in 0..V {
                let pairs = from.add(v * 2 * L::COUNT);
                all[v] = if SECOND { L::load_second(pairs) } else { L::load_first(pairs) };
            }
            all
        }
    }
}

/// `sums[p · R + r] += x[r] · panels[p]`: one chain of additions for each output, ascending, which with scales begins at zero.
/// `x [R][steps]`; `V` vectors hold the sixteen outputs of a panel.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn tile<L: Lanes, W: Weights<L, V>, const V: usize>(
    x: &[f32],
    strip: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
) {
    const { assert!(V * L::COUNT == WIDTH, "vectors of a panel") }
    let rows = steps::check(x.len(), strip, sums);
    // SAFETY: the lengths have been checked.
    unsafe {
        match (rows, strip.panels.len()) {
            (1, 1) => of::<L, W, V, 1, 1>(x, strip, sums),
            (1, 2) => of::<L, W, V, 1, 2>(x, strip, sums),
            (1, 3) => of::<L, W, V, 1, 3>(x, strip, sums),
            (1, 4) => of::<L, W, V, 1, 4>(x, strip, sums),
            (2, 1) => of::<L, W, V, 2, 1>(x, strip, sums),
            (2, 2) => of::<L, W, V, 2, 2>(x, strip, sums),
            (3, 1) => of::<L, W, V, 3, 1>(x, strip, sums),
            (4, 1) => of::<L, W, V, 4, 1>(x, strip, sums),
            (5, 1) => of::<L, W, V, 5, 1>(x, strip, sums),
            (6, 1) => of::<L, W, V, 6, 1>(x, strip, sums),
            (rows, panels) => unreachable!("a tile of {rows} rows and {panels} panels"),
        }
    }
}

/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn of<L: Lanes, W: Weights<L, V>, const V: usize, const R: usize, const P: usize>(
    x: &[f32],
    strip: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
) {
    // SAFETY: the caller's.
    unsafe {
        match strip.fetch {
            Fetch::Nothing => multiply::<L, W, V, R, P, NOTHING>(x, strip, sums),
            Fetch::Next => multiply::<L, W, V, R, P, NEXT>(x, strip, sums),
            Fetch::Ahead(_) | Fetch::Rows(_) => multiply::<L, W, V, R, P, BEHIND>(x, strip, sums),
        }
    }
}

/// # Safety
/// As for [`Lanes`]; `R` packed rows of an even number of steps, `P` panels of sixteen times that, `R · P` sums.
#[inline(always)]
unsafe fn multiply<L: Lanes, W: Weights<L, V>, const V: usize, const R: usize, const P: usize, const FETCH: u8>(
    x: &[f32],
    Strip { panels, scales, fetch }: Strip<'_, W::Element>,
    sums: &mut [[f32; WIDTH]],
) {
    // A cache line for each pair of steps.
    let behind = match fetch {
        Fetch::Ahead(elements) => panels[0].as_ptr().wrapping_add(elements).cast(),
        Fetch::Rows(rows) => rows.as_ptr(),
        Fetch::Nothing | Fetch::Next => std::ptr::null(),
    };
    let mut w = [std::ptr::null::<W::Element>(); P];
    w.iter_mut().zip(panels).for_each(|(w, panel)| *w = panel.as_ptr());
    // The same, which the compiler is not to know: it would keep what it has loaded for the first steps of pairs until the
    // second ones, and registers are few.
    let again = black_box(w);
    let steps = x.len() / R;
    // SAFETY: `pair` stays below half of the steps, of which a panel holds 32 elements for each; a prefetch may name any
    // address.
    unsafe {
        let mut totals = [[[L::splat(0.0); V]; P]; R];
        for r in 0..R {
            for p in 0..P {
                for v in 0..V {
                    if scales.is_none() {
                        totals[r][p][v] = L::load(sums[p * R + r].as_ptr().add(v * L::COUNT));
                    }
                }
            }
        }
        for first in (0..steps / 2).step_by(UNROLLED) {
            for pair in first..first + UNROLLED {
                let (x, at) = (x.as_ptr().add(2 * pair), pair * PAIRS);
                add::<L, W, V, R, P, false>((x, steps), (w, at), &mut totals);
                add::<L, W, V, R, P, true>((x.add(1), steps), (again, at), &mut totals);
                if FETCH == BEHIND {
                    L::prefetch(behind.wrapping_add(at));
                }
                for p in 0..P {
                    if FETCH == NEXT {
                        L::prefetch(w[p].wrapping_add(AHEAD + at).cast());
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                for v in 0..V {
                    let sum = sums[p * R + r].as_mut_ptr().add(v * L::COUNT);
                    let total = match scales {
                        None => totals[r][p][v],
                        Some(scales) => L::load(sum).add(L::splat(scales[p]).mul(totals[r][p][v])),
                    };
                    total.store(sum);
                }
            }
        }
    }
}

/// The first step of a pair, or the second: of the inputs and the weights, those that are fewer stay in registers while the
/// others come one by one. (No closures: they are not always compiled for the instruction set of who calls.)
///
/// # Safety
/// As for [`Lanes`]; inputs of `R` rows lie `steps` apart, and a pair for each of sixteen outputs `at` weights behind each of `w`.
#[inline(always)]
unsafe fn add<L: Lanes, W: Weights<L, V>, const V: usize, const R: usize, const P: usize, const SECOND: bool>(
    (x, steps): (*const f32, usize),
    (w, at): ([*const W::Element; P], usize),
    totals: &mut [[[L; V]; P]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        if R < P * V {
            let mut inputs = [L::splat(0.0); R];
            for r in 0..R {
                inputs[r] = L::splat(*x.add(r * steps));
            }
            for p in 0..P {
                let weights = W::load::<SECOND>(w[p].add(at));
                for v in 0..V {
                    for r in 0..R {
                        totals[r][p][v] = weights[v].mul_add(inputs[r], totals[r][p][v]);
                    }
                }
            }
        } else {
            let mut weights = [[L::splat(0.0); V]; P];
            for p in 0..P {
                weights[p] = W::load::<SECOND>(w[p].add(at));
            }
            for r in 0..R {
                let input = L::splat(*x.add(r * steps));
                for p in 0..P {
                    for v in 0..V {
                        totals[r][p][v] = weights[p][v].mul_add(input, totals[r][p][v]);
                    }
                }
            }
        }
    }
}
