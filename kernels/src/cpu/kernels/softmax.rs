//! The weights of attention.
#![allow(unsafe_code)]

use super::{
    exp::exp,
    lanes::{Lanes, MOST},
};

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
