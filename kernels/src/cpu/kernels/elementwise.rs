//! Loops over single rows: rounding, norm, SwiGLU.
#![allow(unsafe_code)]

use super::{
    exp::exp,
    lanes::{Lanes, MOST},
};
use crate::{activation, panels::WIDTH};

/// `out = round(x)` to bf16.
#[inline(always)]
pub(super) fn round(x: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out = activation::from_bf16(activation::to_bf16(*x)));
}

/// Chains of additions in a norm.
const CHAINS: usize = 4;

/// `out = gain ⊙ x / sqrt(mean(x²) + eps)`. Of `L` lanes, element `i` is added to lane `i % L` of chain `i / L % 4`;
/// then the chains are added pairwise, then the lanes.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn rms_norm<L: Lanes>(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    let (vectors, tail) = x.split_at(x.len() - x.len() % L::COUNT);
    let mut last = [0.0; MOST];
    last[..tail.len()].copy_from_slice(tail);
    // SAFETY: whole vectors are loaded.
    let squares = unsafe {
        let mut chains = [L::splat(0.0); CHAINS];
        for vectors in vectors.chunks(CHAINS * L::COUNT) {
            for (chain, vector) in chains.iter_mut().zip(vectors.chunks_exact(L::COUNT)) {
                let x = L::load(vector.as_ptr());
                *chain = x.mul_add(x, *chain);
            }
        }
        let x = L::load(last.as_ptr());
        let [a, b, c, d] = chains;
        a.add(b).add(c.add(d)).add(x.mul(x)).sum()
    };
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
        *out = gain * (x * scale);
    }
}

/// `out = gate / (1 + exp(−gate)) · up`
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn swiglu<L: Lanes>(gate: &[f32; WIDTH], up: &[f32; WIDTH], out: &mut [f32; WIDTH]) {
    for at in (0..WIDTH).step_by(L::COUNT) {
        // SAFETY: the lanes from `at` lie within the sixteen.
        unsafe {
            let gate = L::load(gate.as_ptr().add(at));
            let up = L::load(up.as_ptr().add(at));
            let one = L::splat(1.0);
            let silu = gate.div(one.add(exp(gate.mul(L::splat(-1.0)))));
            silu.mul(up).store(out.as_mut_ptr().add(at));
        }
    }
}
