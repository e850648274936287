//! Powers of e of many numbers: plain arithmetic without branches, which compiles to vectors and has the same bits on every
//! machine.

use std::f64::consts::{LN_2, LOG2_E};

/// Below it powers are taken as zero; they would soon leave the range of normal numbers.
const LEAST: f64 = -700.0;
/// A number of this size has no bits below the unit: adding it rounds to whole numbers, which its lowest bits then hold.
const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
/// The upper bits of ln 2, of which any whole multiple that comes up is exact.
const LN_2_UPPER: f64 = f64::from_bits(LN_2.to_bits() & !0x7ff_ffff);
/// ln 2 without them.
const LN_2_LOWER: f64 = 1.299_650_689_388_988_9e-8;
/// `1 / n!`, from `n = 12` down to 0.
const TERMS: [f64; 13] = {
    let mut terms = [1.0; 13];
    let mut n = 1;
    while n < 13 {
        terms[12 - n] = terms[13 - n] / n as f64;
        n += 1;
    }
    terms
};

/// `eˣ` of a number that is not above 0, to within 1e-15 of it. Not of NaN.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    let clamped = if x > LEAST { x } else { LEAST };
    let shifted = clamped * LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = clamped - whole * LN_2_UPPER - whole * LN_2_LOWER;
    let mut sum = TERMS[0];
    let mut at = 1;
    while at < TERMS.len() {
        sum = sum * rest + TERMS[at];
        at += 1;
    }
    // Two to the power of the whole part: its lowest bits, plus the bias, as an exponent.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x > LEAST { sum * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn of_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([exp(f64::NEG_INFINITY), exp(-1e30), exp(-700.0)], [0.0; 3]);
        assert!(exp(-699.9) > 0.0);
        assert_eq!(LN_2_UPPER + LN_2_LOWER, LN_2);
    }

    proptest! {
        #[test]
        fn is_near_the_power(x in -699.0f64..0.0) {
            prop_assert!((exp(x) / x.exp() - 1.0).abs() < 1e-15, "{x}: {} {}", exp(x), x.exp());
        }
    }
}
