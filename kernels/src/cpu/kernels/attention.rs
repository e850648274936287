//! The core of attention over the latent cache: scores, weights, weighted sums, for a few heads at a time so that each
//! key is loaded and widened once for all of them.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::{
    Columns,
    exp::exp,
    lanes::{LANES, Lanes},
};

/// Heads side by side.
const HEADS: usize = 4;
/// Keys side by side in a product of queries and keys.
const KEYS: usize = 2;

/// `out[h][at + j] = q[h] · keys[j]`: element `i` is added to lane `i % 8`, ascending; then the lanes are added.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes>(q: &[f32], keys: &[u16], stride: usize, out: Columns<'_>) {
    assert!(stride.is_multiple_of(LANES) && stride > 0, "stride of keys");
    let count = keys.len() / stride;
    let Columns { values, width, at } = out;
    assert!(at + count <= width, "scores of a split");
    let groups = q.chunks(HEADS * stride).zip(values.chunks_mut(HEADS * width));
    for (q, out) in groups {
        for key in (0..count).step_by(KEYS) {
            let pair = &keys[key * stride..count.min(key + KEYS) * stride];
            let mut dots = [[0.0; KEYS]; HEADS];
            // SAFETY: `dispatch` looks at the numbers of heads and keys.
            unsafe { dots_of::<L>(q, pair, stride, &mut dots) };
            for (out, dots) in out.chunks_exact_mut(width).zip(dots) {
                let out = &mut out[at + key..count.min(key + KEYS) + at];
                out.iter_mut().zip(dots).for_each(|(out, dot)| *out = dot);
            }
        }
    }
}

#[inline(always)]
unsafe fn dots_of<L: Lanes>(q: &[f32], keys: &[u16], stride: usize, out: &mut [[f32; KEYS]; HEADS]) {
    // SAFETY: the const parameters are the numbers of rows.
    unsafe {
        match (q.len() / stride, keys.len() / stride) {
            (1, 1) => dots::<L, 1, 1>(q, keys, stride, out),
            (2, 1) => dots::<L, 2, 1>(q, keys, stride, out),
            (3, 1) => dots::<L, 3, 1>(q, keys, stride, out),
            (4, 1) => dots::<L, 4, 1>(q, keys, stride, out),
            (1, 2) => dots::<L, 1, 2>(q, keys, stride, out),
            (2, 2) => dots::<L, 2, 2>(q, keys, stride, out),
            (3, 2) => dots::<L, 3, 2>(q, keys, stride, out),
            (4, 2) => dots::<L, 4, 2>(q, keys, stride, out),
            (heads, keys) => unreachable!("{heads} heads and {keys} keys at once"),
        }
    }
}

/// # Safety
/// As for [`Lanes`]; `q [H, stride]`, `keys [K, stride]`, `stride` a multiple of eight.
#[inline(always)]
unsafe fn dots<L: Lanes, const H: usize, const K: usize>(
    q: &[f32],
    keys: &[u16],
    stride: usize,
    out: &mut [[f32; KEYS]; HEADS],
) {
    // SAFETY: `at + 8` stays within a row.
    unsafe {
        let mut sums = [[L::splat(0.0); K]; H];
        for at in (0..stride).step_by(LANES) {
            let mut key = [L::splat(0.0); K];
            for k in 0..K {
                key[k] = L::load_bf16(keys.as_ptr().add(k * stride + at));
            }
            for h in 0..H {
                let q = L::load(q.as_ptr().add(h * stride + at));
                for k in 0..K {
                    sums[h][k] = q.mul_add(key[k], sums[h][k]);
                }
            }
        }
        for h in 0..H {
            for k in 0..K {
                out[h][k] = sums[h][k].sum();
            }
        }
    }
}

/// Scales scores, replaces them by `exp(score − max)`, and returns `max` and the sum of these. Score `j` is added to
/// lane `j % 8`, ascending; then the lanes are added.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn softmax<L: Lanes>(scale: f32, scores: &mut [f32]) -> (f32, f32) {
    let (vectors, tail) = scores.as_chunks_mut::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    // SAFETY: whole arrays of eight elements are loaded and stored.
    unsafe {
        let mut max = L::load(largest.as_ptr());
        for vector in vectors.iter_mut() {
            let score = L::load(vector.as_ptr()).mul(L::splat(scale));
            score.store(vector.as_mut_ptr());
            max = score.max(max);
        }
        max.store(largest.as_mut_ptr());
    }
    tail.iter_mut().for_each(|score| *score *= scale);
    let max = largest.iter().chain(&*tail).fold(f32::NEG_INFINITY, |max, score| max.max(*score));
    let mut last = [max; LANES];
    last[..tail.len()].copy_from_slice(tail);
    // SAFETY: whole arrays of eight elements are loaded and stored.
    unsafe {
        let shift = L::splat(-max);
        let mut sum = L::splat(0.0);
        for vector in vectors {
            let weight = exp(L::load(vector.as_ptr()).add(shift));
            weight.store(vector.as_mut_ptr());
            sum = sum.add(weight);
        }
        exp(L::load(last.as_ptr()).add(shift)).store(last.as_mut_ptr());
        last[tail.len()..].fill(0.0);
        tail.copy_from_slice(&last[..tail.len()]);
        (max, sum.add(L::load(last.as_ptr())).sum())
    }
}

/// `sums[h] += weights[h][at + j] · keys[j]`, lanes over the elements of the latent, `j` ascending.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn weigh<L: Lanes>(weights: Columns<'_>, keys: &[u16], stride: usize, sums: &mut [f32]) {
    let Columns { values, width, at } = weights;
    let heads = values.len() / width;
    let length = sums.len() / heads;
    assert!(length.is_multiple_of(LANES) && length <= stride && at + keys.len() / stride <= width, "sums of latents");
    let groups = values.chunks(HEADS * width).zip(sums.chunks_mut(HEADS * length));
    for (weights, sums) in groups {
        let weights = &weights[at..];
        // SAFETY: the const parameter is the number of heads; the lengths have been checked.
        unsafe {
            match sums.len() / length {
                1 => weigh_heads::<L, 1>(weights, width, keys, stride, sums),
                2 => weigh_heads::<L, 2>(weights, width, keys, stride, sums),
                3 => weigh_heads::<L, 3>(weights, width, keys, stride, sums),
                _ => weigh_heads::<L, 4>(weights, width, keys, stride, sums),
            }
        }
    }
}

/// # Safety
/// As for [`Lanes`]; `sums [H, len]`, `weights[h · width + j]` for every key `j`, `keys [_, stride]`, `len <= stride`, both
/// multiples of eight.
#[inline(always)]
unsafe fn weigh_heads<L: Lanes, const H: usize>(
    weights: &[f32],
    width: usize,
    keys: &[u16],
    stride: usize,
    sums: &mut [f32],
) {
    let length = sums.len() / H;
    let mut at = 0;
    // SAFETY: `at` and the lanes loaded from there stay below `length`.
    unsafe {
        while at + 2 * LANES <= length {
            weigh_vectors::<L, H, 2>(weights, width, keys, stride, sums, at);
            at += 2 * LANES;
        }
        if at < length {
            weigh_vectors::<L, H, 1>(weights, width, keys, stride, sums, at);
        }
    }
}

/// # Safety
/// As for [`weigh_heads`]; `at + 8 · V <= len`.
#[inline(always)]
unsafe fn weigh_vectors<L: Lanes, const H: usize, const V: usize>(
    weights: &[f32],
    width: usize,
    keys: &[u16],
    stride: usize,
    sums: &mut [f32],
    at: usize,
) {
    let length = sums.len() / H;
    // SAFETY: the contract of this function.
    unsafe {
        let mut totals = [[L::splat(0.0); V]; H];
        for h in 0..H {
            for v in 0..V {
                totals[h][v] = L::load(sums.as_ptr().add(h * length + at + v * LANES));
            }
        }
        for j in 0..keys.len() / stride {
            let mut key = [L::splat(0.0); V];
            for v in 0..V {
                key[v] = L::load_bf16(keys.as_ptr().add(j * stride + at + v * LANES));
            }
            for h in 0..H {
                let weight = L::splat(*weights.as_ptr().add(h * width + j));
                for v in 0..V {
                    totals[h][v] = weight.mul_add(key[v], totals[h][v]);
                }
            }
        }
        for h in 0..H {
            for v in 0..V {
                totals[h][v].store(sums.as_mut_ptr().add(h * length + at + v * LANES));
            }
        }
    }
}
