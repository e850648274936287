//! The core of attention over the latent cache: scores, weights, weighted sums, for a few heads at a time so that each
//! key is loaded and widened once for all of them.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::{
    Columns,
    exp::exp,
    lanes::{Lanes, MOST},
};

/// Heads side by side in a product of queries and keys.
const HEADS: usize = 4;
/// Keys side by side in a product of queries and keys.
const KEYS: usize = 3;
/// Keys that are taken through all queries while they lie in the nearest cache.
const STRIP: usize = 4 * KEYS;
/// Heads side by side in a sum of latents, at most.
const WEIGHED: usize = 6;
/// Vectors side by side in a sum of latents.
const VECTORS: usize = 2;

/// `out[h][at + j] = q[h] · keys[j]`: element `i` is added to lane `i % L`, ascending; then the lanes are added.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes>(q: &[f32], keys: &[u16], stride: usize, out: Columns<'_>) {
    assert!(stride.is_multiple_of(L::COUNT) && stride > 0, "stride of keys");
    let count = keys.len() / stride;
    let Columns { values, width, at } = out;
    assert!(at + count <= width, "scores of a split");
    for strip in (0..count).step_by(STRIP) {
        let end = count.min(strip + STRIP);
        for (q, out) in q.chunks(HEADS * stride).zip(values.chunks_mut(HEADS * width)) {
            for key in (strip..end).step_by(KEYS) {
                let keys = &keys[key * stride..end.min(key + KEYS) * stride];
                // SAFETY: the const parameters are the numbers of heads and keys; the lengths have been checked.
                unsafe {
                    match (q.len() / stride, keys.len() / stride) {
                        (1, 1) => dots::<L, 1, 1>(q, keys, stride, &mut out[at + key..], width),
                        (2, 1) => dots::<L, 2, 1>(q, keys, stride, &mut out[at + key..], width),
                        (3, 1) => dots::<L, 3, 1>(q, keys, stride, &mut out[at + key..], width),
                        (4, 1) => dots::<L, 4, 1>(q, keys, stride, &mut out[at + key..], width),
                        (1, 2) => dots::<L, 1, 2>(q, keys, stride, &mut out[at + key..], width),
                        (2, 2) => dots::<L, 2, 2>(q, keys, stride, &mut out[at + key..], width),
                        (3, 2) => dots::<L, 3, 2>(q, keys, stride, &mut out[at + key..], width),
                        (4, 2) => dots::<L, 4, 2>(q, keys, stride, &mut out[at + key..], width),
                        (1, 3) => dots::<L, 1, 3>(q, keys, stride, &mut out[at + key..], width),
                        (2, 3) => dots::<L, 2, 3>(q, keys, stride, &mut out[at + key..], width),
                        (3, 3) => dots::<L, 3, 3>(q, keys, stride, &mut out[at + key..], width),
                        (4, 3) => dots::<L, 4, 3>(q, keys, stride, &mut out[at + key..], width),
                        (heads, keys) => unreachable!("{heads} heads and {keys} keys at once"),
                    }
                }
            }
        }
    }
}

/// `out[h · width + k] = q[h] · keys[k]`
///
/// # Safety
/// As for [`Lanes`]; `q [H, stride]`, `keys [K, stride]`, `stride` a multiple of the lanes, room for the last output.
#[inline(always)]
unsafe fn dots<L: Lanes, const H: usize, const K: usize>(
    q: &[f32],
    keys: &[u16],
    stride: usize,
    out: &mut [f32],
    width: usize,
) {
    // SAFETY: `at` and the lanes from there stay within a row.
    unsafe {
        let mut sums = [[L::splat(0.0); K]; H];
        for at in (0..stride).step_by(L::COUNT) {
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
                *out.as_mut_ptr().add(h * width + k) = sums[h][k].sum();
            }
        }
    }
}

/// Scales scores, replaces them by `exp(score − max)`, and returns `max` and the sum of these. Score `j` is added to
/// lane `j % L`, ascending; then the lanes are added.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn softmax<L: Lanes>(scale: f32, scores: &mut [f32]) -> (f32, f32) {
    let (vectors, tail) = scores.split_at_mut(scores.len() - scores.len() % L::COUNT);
    let mut largest = [f32::NEG_INFINITY; MOST];
    // SAFETY: whole vectors are loaded and stored.
    unsafe {
        let mut max = L::load(largest.as_ptr());
        for vector in vectors.chunks_exact_mut(L::COUNT) {
            let score = L::load(vector.as_ptr()).mul(L::splat(scale));
            score.store(vector.as_mut_ptr());
            max = score.max(max);
        }
        max.store(largest.as_mut_ptr());
    }
    tail.iter_mut().for_each(|score| *score *= scale);
    let max = largest.iter().chain(&*tail).fold(f32::NEG_INFINITY, |max, score| max.max(*score));
    let mut last = [max; MOST];
    last[..tail.len()].copy_from_slice(tail);
    // SAFETY: whole vectors are loaded and stored.
    unsafe {
        let shift = L::splat(-max);
        let mut sum = L::splat(0.0);
        for vector in vectors.chunks_exact_mut(L::COUNT) {
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
    assert!(
        length.is_multiple_of(L::COUNT) && length <= stride && at + keys.len() / stride <= width,
        "sums of latents"
    );
    let at_once = heads.div_ceil(heads.div_ceil(WEIGHED));
    let mut from = 0;
    // Some elements of the keys are taken through all queries while they lie in the nearest cache.
    while from < length {
        let vectors = VECTORS.min((length - from) / L::COUNT);
        for (weights, sums) in values.chunks(at_once * width).zip(sums.chunks_mut(at_once * length)) {
            let part = Part { weights: &weights[at..], width, keys, stride, length, from };
            // SAFETY: the const parameters are the numbers of heads and vectors; the lengths have been checked.
            unsafe { weigh_part::<L>(&part, vectors, sums) };
        }
        from += vectors * L::COUNT;
    }
}

/// Some elements of a sum of latents for a few heads: `weights[h · width + j]` for every key `j`, `keys [_, stride]`, elements
/// from `from` on of sums `[heads, length]`.
struct Part<'a> {
    weights: &'a [f32],
    width: usize,
    keys: &'a [u16],
    stride: usize,
    length: usize,
    from: usize,
}

/// # Safety
/// As for [`weigh_vectors`].
#[inline(always)]
unsafe fn weigh_part<L: Lanes>(part: &Part<'_>, vectors: usize, sums: &mut [f32]) {
    // SAFETY: the contract of this function.
    unsafe {
        match (sums.len() / part.length, vectors) {
            (1, 1) => weigh_vectors::<L, 1, 1>(part, sums),
            (2, 1) => weigh_vectors::<L, 2, 1>(part, sums),
            (3, 1) => weigh_vectors::<L, 3, 1>(part, sums),
            (4, 1) => weigh_vectors::<L, 4, 1>(part, sums),
            (5, 1) => weigh_vectors::<L, 5, 1>(part, sums),
            (6, 1) => weigh_vectors::<L, 6, 1>(part, sums),
            (1, 2) => weigh_vectors::<L, 1, 2>(part, sums),
            (2, 2) => weigh_vectors::<L, 2, 2>(part, sums),
            (3, 2) => weigh_vectors::<L, 3, 2>(part, sums),
            (4, 2) => weigh_vectors::<L, 4, 2>(part, sums),
            (5, 2) => weigh_vectors::<L, 5, 2>(part, sums),
            (6, 2) => weigh_vectors::<L, 6, 2>(part, sums),
            (heads, vectors) => unreachable!("{heads} heads and {vectors} vectors at once"),
        }
    }
}

/// # Safety
/// As for [`Lanes`]; `H` heads, `from + L · V <= length <= stride`, weights for every key.
#[inline(always)]
unsafe fn weigh_vectors<L: Lanes, const H: usize, const V: usize>(part: &Part<'_>, sums: &mut [f32]) {
    let Part { weights, width, keys, stride, length, from } = *part;
    // SAFETY: the contract of this function.
    unsafe {
        let mut totals = [[L::splat(0.0); V]; H];
        for h in 0..H {
            for v in 0..V {
                totals[h][v] = L::load(sums.as_ptr().add(h * length + from + v * L::COUNT));
            }
        }
        for j in 0..keys.len() / stride {
            let mut key = [L::splat(0.0); V];
            for v in 0..V {
                key[v] = L::load_bf16(keys.as_ptr().add(j * stride + from + v * L::COUNT));
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
                totals[h][v].store(sums.as_mut_ptr().add(h * length + from + v * L::COUNT));
            }
        }
    }
}
