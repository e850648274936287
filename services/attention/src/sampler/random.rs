//! The counter-based generator behind sampling: Philox 4×32 with ten rounds (Salmon et al., "Parallel random numbers: as
//! easy as 1, 2, 3", SC 2011). A draw is a pure function of (seed, choice, position), so that any replica can make it.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The number in [0, 1) that decides the token at `position` of choice `choice`; a multiple of 2⁻⁵³.
pub fn draw(seed: u64, choice: u32, position: u32) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let [low, high, _, _] = philox([position, 0, choice, 0], key);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let (high0, low0) = multiply(MULTIPLIERS[0], counter[0]);
        let (high1, low1) = multiply(MULTIPLIERS[1], counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

fn multiply(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The known answers that the authors of Philox publish.
    #[test]
    fn gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let answer = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), answer);
    }

    /// Sequences that have been served go on with the same draws: these may never change.
    #[test]
    fn draws_stay_what_they_are() {
        let bits = 0xe169_c58d_6627_e8d5_u64 >> 11;
        assert_eq!(draw(0, 0, 0), bits as f64 / 9_007_199_254_740_992.0);
        let again: Vec<f64> = (0..3).map(|position| draw(7, 1, position)).collect();
        assert_eq!(again, [draw(7, 1, 0), draw(7, 1, 1), draw(7, 1, 2)]);
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let mut seen = HashSet::new();
        for seed in [0, 1, 1 << 32, u64::MAX] {
            for choice in 0..10 {
                for position in 0..100 {
                    assert!(seen.insert(draw(seed, choice, position).to_bits()));
                }
            }
        }
    }

    #[test]
    fn draws_are_uniform_along_positions_and_choices() {
        uniform((0..100_000).map(|position| draw(42, 0, position)).collect());
        uniform((0..100_000).map(|choice| draw(42, choice, 17)).collect());
        uniform((0..100_000).map(|seed| draw(seed, 0, 17)).collect());
    }

    /// Chi-square over 100 bins and the correlation of neighbours, each at about five standard deviations.
    fn uniform(draws: Vec<f64>) {
        let mut bins = [0f64; 100];
        draws.iter().for_each(|u| bins[(u * 100.0) as usize] += 1.0);
        let expected = draws.len() as f64 / 100.0;
        let chi_square: f64 = bins.iter().map(|n| (n - expected).powi(2) / expected).sum();
        assert!((chi_square - 99.0).abs() < 5.0 * (2.0f64 * 99.0).sqrt(), "chi-square {chi_square}");
        let products: f64 = draws.windows(2).map(|pair| (pair[0] - 0.5) * (pair[1] - 0.5)).sum();
        let correlation = 12.0 * products / (draws.len() - 1) as f64;
        assert!(correlation.abs() < 5.0 / (draws.len() as f64).sqrt(), "correlation {correlation}");
    }
}
