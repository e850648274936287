//! Normal numbers by counter: element `i` of a tensor follows from the seed, the tensor's name and `i`, so that
//! any part can be made by any thread.

use half::bf16;
use sha2::{Digest, Sha256};

/// What every e4m3 is multiplied by: most are then of magnitudes about 41, of at most 448.
pub(super) const SCALE: f32 = 1.0 / 2048.0;

const STANDARD_DEVIATION: f64 = 0.02;
/// Different numbers: as many equally likely ones as 12 bits choose from.
const LEVELS: usize = 1 << 12;
/// Numbers that one counter value gives, 16 bits each.
const LANES: usize = 4;

/// The key of one tensor.
pub(super) fn key(seed: u64, name: &str) -> u64 {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name.as_bytes()).finalize();
    digest.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
}

/// Fills `out` with the same number.
pub(super) fn repeat<const SIZE: usize>(number: [u8; SIZE], out: &mut [u8]) {
    out.as_chunks_mut().0.iter_mut().for_each(|to| *to = number);
}

/// Equally likely numbers of the normal distribution.
pub(super) struct Normal {
    bf16: Vec<[u8; 2]>,
    /// In units of [`SCALE`].
    e4m3: Vec<[u8; 1]>,
}

impl Normal {
    /// Takes the middles of equally likely ranges, scaled so that the standard deviation is exact before rounding.
    pub(super) fn new() -> Self {
        let quantiles: Vec<f64> = (0..LEVELS).map(|level| quantile((level as f64 + 0.5) / LEVELS as f64)).collect();
        let variance = quantiles.iter().map(|x| x * x).sum::<f64>() / LEVELS as f64;
        let scale = STANDARD_DEVIATION / libm::sqrt(variance);
        Self {
            bf16: quantiles.iter().map(|x| bf16::from_f64(x * scale).to_le_bytes()).collect(),
            e4m3: quantiles.iter().map(|x| [e4m3(x * scale / f64::from(SCALE))]).collect(),
        }
    }

    /// Elements of bf16 from `first` on, a multiple of 4, of the tensor with this key.
    pub(super) fn fill_bf16(&self, key: u64, first: u64, out: &mut [u8]) {
        fill(&self.bf16, key, first, out);
    }

    /// The same of e4m3.
    pub(super) fn fill_e4m3(&self, key: u64, first: u64, out: &mut [u8]) {
        fill(&self.e4m3, key, first, out);
    }
}

fn fill<const SIZE: usize>(table: &[[u8; SIZE]], key: u64, first: u64, out: &mut [u8]) {
    let counters = first / LANES as u64..;
    for (counter, numbers) in counters.zip(out.chunks_mut(LANES * SIZE)) {
        let mut bits = mix(key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        for number in numbers.as_chunks_mut().0 {
            *number = table[bits as usize % LEVELS];
            bits >>= 16;
        }
    }
}

/// The bits of the nearest e4m3, ties to even: four of exponent (bias 7), three of mantissa, 448 at most.
fn e4m3(x: f64) -> u8 {
    let magnitude = x.abs().min(448.0);
    let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(-6);
    let steps = (magnitude * libm::exp2(f64::from(3 - exponent))).round_ties_even() as i32;
    // Steps of the least exponent may be fewer than eight: they are below the least normal number.
    (steps + ((exponent + 6) << 3)) as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// The finaliser of SplitMix64: every input bit changes every output bit with a chance near one half.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The number that a standard normal one is below with the chance `p`, by bisection.
fn quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-6.0, 6.0);
    for _ in 0..60 {
        let middle: f64 = (low + high) / 2.0;
        let below = 0.5 * (1.0 + libm::erf(middle / std::f64::consts::SQRT_2));
        if below < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(key: u64, first: u64, count: usize) -> Vec<f64> {
        let mut bytes = vec![0; count * 2];
        Normal::new().fill_bf16(key, first, &mut bytes);
        bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f64()).collect()
    }

    #[test]
    fn numbers_are_normal() {
        let numbers = numbers(key(7, "x"), 0, 1 << 20);
        let count = numbers.len() as f64;
        let mean = numbers.iter().sum::<f64>() / count;
        let deviation = (numbers.iter().map(|x| x * x).sum::<f64>() / count).sqrt();
        assert!(mean.abs() < 1e-4, "{mean}");
        assert!((deviation / 0.02 - 1.0).abs() < 0.005, "{deviation}");
        let within = |limit: f64| numbers.iter().filter(|x| x.abs() < limit * 0.02).count() as f64 / count;
        assert!((within(1.0) - 0.6827).abs() < 0.005 && (within(2.0) - 0.9545).abs() < 0.003, "{}", within(1.0));
        let neighbours = numbers.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / count / 4e-4;
        assert!(neighbours.abs() < 0.005, "{neighbours}");
    }

    #[test]
    fn e4m3_is_the_nearest() {
        assert_eq!([0.0, 1.0, -1.0, 1.0625, 1.1875, 448.0, -1e9].map(e4m3), [0, 0x38, 0xb8, 0x38, 0x3a, 0x7e, 0xfe]);
        assert_eq!([1.0 / 512.0, 0.4 / 512.0, 7.6 / 512.0, 1.95].map(e4m3), [1, 0, 8, 0x40]);
    }

    #[test]
    fn numbers_in_fp8_are_those_in_bf16_but_for_their_rounding() {
        let mut bytes = vec![0; 1000];
        Normal::new().fill_e4m3(3, 400, &mut bytes);
        for (byte, expected) in bytes.iter().zip(numbers(3, 400, 1000)) {
            // A number that was rounded to bf16 first may fall on the middle between two.
            let again = e4m3(expected / f64::from(SCALE));
            assert!(byte.abs_diff(again) <= 1, "{byte:#x}, expected {again:#x} of {expected}");
        }
    }

    #[test]
    fn any_part_is_the_same_as_in_the_whole() {
        let whole = numbers(3, 0, 1000);
        assert_eq!(whole[400..], numbers(3, 400, 600));
        assert_eq!(whole[..7], numbers(3, 0, 7));
    }

    #[test]
    fn names_and_seeds_make_different_numbers() {
        assert_ne!(key(1, "a"), key(1, "b"));
        assert_ne!(key(1, "a"), key(2, "a"));
    }
}
