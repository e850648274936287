//! Normal bf16 numbers by counter: element `i` of a tensor follows from the seed, the tensor's name and `i`, so that
//! any part can be made by any thread.

use half::bf16;
use sha2::{Digest, Sha256};

/// Bytes of one number.
pub(super) const ELEMENT_BYTES: u64 = 2;

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

/// Fills `out` with ones.
pub(super) fn ones(out: &mut [u8]) {
    out.as_chunks_mut().0.iter_mut().for_each(|number| *number = bf16::ONE.to_le_bytes());
}

/// Equally likely numbers of the normal distribution.
pub(super) struct Normal {
    table: Vec<[u8; ELEMENT_BYTES as usize]>,
}

impl Normal {
    /// Takes the middles of equally likely ranges, scaled so that the standard deviation is exact before rounding.
    pub(super) fn new() -> Self {
        let quantiles: Vec<f64> = (0..LEVELS).map(|level| quantile((level as f64 + 0.5) / LEVELS as f64)).collect();
        let variance = quantiles.iter().map(|x| x * x).sum::<f64>() / LEVELS as f64;
        let scale = STANDARD_DEVIATION / libm::sqrt(variance);
        Self { table: quantiles.iter().map(|x| bf16::from_f64(x * scale).to_le_bytes()).collect() }
    }

    /// Elements `[first, first + out.len() / 2)` of the tensor with this key; `first` is a multiple of 4.
    pub(super) fn fill(&self, key: u64, first: u64, out: &mut [u8]) {
        let counters = first / LANES as u64..;
        for (counter, numbers) in counters.zip(out.chunks_mut(LANES * ELEMENT_BYTES as usize)) {
            let mut bits = mix(key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            for number in numbers.as_chunks_mut().0 {
                *number = self.table[bits as usize % LEVELS];
                bits >>= 16;
            }
        }
    }
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
        Normal::new().fill(key, first, &mut bytes);
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
