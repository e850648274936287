//! The exponential function on lanes.
#![allow(unsafe_code)]

use super::lanes::Lanes;

/// Arguments are brought into this range, in which the result is a normal number.
const LOWEST: f32 = -87.0;
const HIGHEST: f32 = 88.0;
/// `ln 2` in two parts: the first has so few bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// `1 / n!` for `n` from 7 down to 0.
const TERMS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// `exp(x) = 2^n · exp(x − n · ln 2)` with `n` the nearest integer to `x / ln 2`, and the rest, at most 0.35 in size, by
/// the first eight terms of the series. The same polynomial for all instruction sets; they differ in the rounding of
/// `mul_add` only. Relative error below 3e-7. NaN stays NaN.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the contract of this function.
    unsafe {
        let x = L::splat(LOWEST).max(L::splat(HIGHEST).min(x));
        let n = x.mul(L::splat(std::f32::consts::LOG2_E)).nearest();
        let rest = n.mul_add(L::splat(-LN2_HIGH), x);
        let rest = n.mul_add(L::splat(-LN2_LOW), rest);
        let mut sum = L::splat(TERMS[0]);
        for term in &TERMS[1..] {
            sum = sum.mul_add(rest, L::splat(*term));
        }
        sum.mul(n.exp2_integral())
    }
}
