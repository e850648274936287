//! Dot products with rows that are read where they lie.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    super::{InPlace, RowsInPlace},
    Dots, ROWS, pairs,
};
use crate::panels::{Interleaving, PAIRS, STEPS, WIDTH};

/// How many rows ahead values are fetched.
const AHEAD: usize = 16;
/// Pairs of steps in a strip.
const PAIRS_OF_STRIP: usize = STEPS / 2;

impl InPlace for Dots {
    /// Sixteen rows at a time, each a chain of its own.
    fn score(&self, queries: &[u16], rows: RowsInPlace<'_>, behind: &[u16], scores: &mut [f32], first: usize) {
        let depth = queries.len() / WIDTH;
        assert!(depth <= rows.stride && depth.is_multiple_of(2), "queries of {depth} elements");
        assert!(rows.data.len().is_multiple_of(WIDTH * rows.stride), "whole panels of rows");
        assert!(first + rows.data.len() / rows.stride <= scores.len() / WIDTH, "room for the scores of all rows");
        for (index, data) in rows.data.chunks_exact(WIDTH * rows.stride).enumerate() {
            let behind = behind.get(index * WIDTH * rows.stride..).unwrap_or_default();
            let (rows, first) = (RowsInPlace { data, ..rows }, first + index * WIDTH);
            compiled!("avx512f,avx512bf16", fn(queries: &[u16], rows: RowsInPlace<'_>, behind: &[u16], scores: &mut [f32], first: usize) {
                // SAFETY: compiled for AVX-512 with BF16; the lengths have been checked.
                unsafe { score(queries, rows, behind, scores, first) }
            });
        }
    }

    fn weigh(&self, weights: &[f32], strips: &[RowsInPlace<'_>], first: usize, sums: &mut [[f32; WIDTH]]) {
        let rows = sums.len() / 2;
        assert_eq!(weights.len(), strips.len() * rows * PAIRS_OF_STRIP, "weights of {} strips", strips.len());
        let whole = |strip: &RowsInPlace<'_>| first + PAIRS <= strip.stride && strip.data.len() >= STEPS * strip.stride;
        assert!(strips.iter().all(whole), "strips of whole rows");
        compiled!("avx512f,avx512bw,avx512bf16", fn(weights: &[f32], strips: &[RowsInPlace<'_>], first: usize, sums: &mut [[f32; WIDTH]], rows: usize) {
            // SAFETY: compiled for AVX-512 with BF16; the lengths have been checked.
            unsafe {
                match rows {
                    1 => weigh::<1>(weights, strips, first, sums),
                    2 => weigh::<2>(weights, strips, first, sums),
                    3 => weigh::<3>(weights, strips, first, sums),
                    4 => weigh::<4>(weights, strips, first, sums),
                    5 => weigh::<5>(weights, strips, first, sums),
                    6 => weigh::<6>(weights, strips, first, sums),
                    7 => weigh::<7>(weights, strips, first, sums),
                    8 => weigh::<8>(weights, strips, first, sums),
                    9 => weigh::<9>(weights, strips, first, sums),
                    10 => weigh::<10>(weights, strips, first, sums),
                    11 => weigh::<11>(weights, strips, first, sums),
                    ROWS => weigh::<ROWS>(weights, strips, first, sums),
                    rows => unreachable!("a tile of {rows} rows"),
                }
            }
        });
    }
}

/// # Safety
/// The caller is compiled for AVX-512 with BF16; sixteen rows, at least as long as the queries, and room for as many scores from
/// `first` on.
#[inline(always)]
unsafe fn score(queries: &[u16], rows: RowsInPlace<'_>, behind: &[u16], scores: &mut [f32], first: usize) {
    let mut next = behind.chunks(PAIRS);
    // SAFETY: `pair` stays below half of the depth, of which the panel holds 32 elements for each pair and every row two; a
    // prefetch reads nothing.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); WIDTH];
        for (pair, queries) in queries.as_chunks::<PAIRS>().0.iter().enumerate() {
            let queries = pairs(_mm512_loadu_si512(queries.as_ptr().cast()));
            if let Some(line) = next.next() {
                _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
            }
            for r in 0..WIDTH {
                let row = rows.data.as_ptr().add(r * rows.stride + 2 * pair).cast::<i32>();
                sums[r] = _mm512_dpbf16_ps(sums[r], queries, pairs(_mm512_set1_epi32(row.read_unaligned())));
            }
        }
        let cols = scores.len() / WIDTH;
        for (scores, sums) in scores.chunks_exact_mut(cols).zip(transpose(sums)) {
            _mm512_storeu_ps(scores.as_mut_ptr().add(first), sums);
        }
    }
}

/// Sixteen by sixteen values, by exchanging halves of ever smaller blocks.
///
/// # Safety
/// The caller is compiled for AVX-512.
#[inline(always)]
unsafe fn transpose(mut rows: [__m512; WIDTH]) -> [__m512; WIDTH] {
    for half in [8, 4, 2, 1] {
        // Lanes of the first row are numbered from 0, those of the second from sixteen on.
        let upper: [i32; WIDTH] =
            std::array::from_fn(|at| (if at & half == 0 { at } else { WIDTH + (at ^ half) }) as i32);
        let lower: [i32; WIDTH] =
            std::array::from_fn(|at| (if at & half == 0 { at ^ half } else { WIDTH + at }) as i32);
        // SAFETY: the caller's; as many elements.
        unsafe {
            let (upper, lower) = (_mm512_loadu_epi32(upper.as_ptr()), _mm512_loadu_epi32(lower.as_ptr()));
            for r in (0..WIDTH).filter(|r| r & half == 0) {
                let (a, b) = (rows[r], rows[r | half]);
                rows[r] = _mm512_permutex2var_ps(a, upper, b);
                rows[r | half] = _mm512_permutex2var_ps(a, lower, b);
            }
        }
    }
    rows
}

/// # Safety
/// The caller is compiled for AVX-512 with BW and BF16; `R` packed rows of weights and `2 R` sums; each strip has 32 rows, and
/// these 32 elements from `first` on.
#[inline(always)]
unsafe fn weigh<const R: usize>(weights: &[f32], strips: &[RowsInPlace<'_>], first: usize, sums: &mut [[f32; WIDTH]]) {
    // SAFETY: what is read lies in the strips, and as many weights as they have pairs of rows; a prefetch may name any address.
    unsafe {
        let interleaving = Interleaving::new();
        let mut totals = [[_mm512_setzero_ps(); 2]; R];
        for r in 0..R {
            for p in 0..2 {
                totals[r][p] = _mm512_loadu_ps(sums[p * R + r].as_ptr());
            }
        }
        for (strip, weights) in strips.iter().zip(weights.chunks_exact(R * PAIRS_OF_STRIP)) {
            for pair in 0..PAIRS_OF_STRIP {
                let a = strip.data.as_ptr().add(2 * pair * strip.stride + first);
                let b = a.add(strip.stride);
                _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(AHEAD * strip.stride).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * strip.stride).cast());
                let (a, b) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
                let values = interleaving.pairs(a, b).map(pairs);
                for r in 0..R {
                    let weight = *weights.as_ptr().add(r * PAIRS_OF_STRIP + pair);
                    let weight = pairs(_mm512_castps_si512(_mm512_set1_ps(weight)));
                    for p in 0..2 {
                        totals[r][p] = _mm512_dpbf16_ps(totals[r][p], values[p], weight);
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..2 {
                _mm512_storeu_ps(sums[p * R + r].as_mut_ptr(), totals[r][p]);
            }
        }
    }
}
