//! Rotary frequencies and the softmax scale, with YaRN (MODEL §3.5).

use std::f64::consts::PI;

use crate::{ModelConfig, RopeScaling};

/// What the rotary embedding and attention need from the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// `[dr / 2]`: angle of pair `i` at position `p` is `p · frequencies[i]`.
    pub frequencies: Vec<f64>,
    /// Multiplier of cosines and sines.
    pub factor: f64,
    /// Multiplier of attention scores.
    pub softmax_scale: f32,
}

/// Frequencies, factor and softmax scale of `config`, computed in f64. They hold at every length.
pub fn rotary(config: &ModelConfig) -> Rotary {
    let base: Vec<f64> = (0..config.qk_rope / 2)
        .map(|i| libm::pow(config.rope_theta, -(2.0 * i as f64) / config.qk_rope as f64))
        .collect();
    let plain_scale = 1.0 / libm::sqrt(config.qk_head() as f64);
    let Some(scaling) = &config.rope_scaling else {
        return Rotary { frequencies: base, factor: 1.0, softmax_scale: plain_scale as f32 };
    };
    let all_dim = gain(scaling.factor, scaling.mscale_all_dim.unwrap_or(0.0));
    Rotary {
        frequencies: stretched(&base, scaling, config.rope_theta),
        factor: gain(scaling.factor, scaling.mscale.unwrap_or(1.0)) / all_dim,
        softmax_scale: (plain_scale * all_dim * all_dim) as f32,
    }
}

/// `g(m)`: 1 where the context is not extended or `m` is 0.
fn gain(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 }
}

/// High frequencies stay, low ones are divided by the factor, with a ramp between.
fn stretched(base: &[f64], scaling: &RopeScaling, theta: f64) -> Vec<f64> {
    let dim = 2.0 * base.len() as f64;
    let turns_at = |turns: f64| {
        let original = scaling.original_max_position as f64;
        dim * libm::log(original / (2.0 * PI * turns)) / (2.0 * libm::log(theta))
    };
    let low = libm::floor(turns_at(scaling.beta_fast)).max(0.0);
    let high = libm::ceil(turns_at(scaling.beta_slow)).min(dim - 1.0);
    let high = if low == high { high + 0.001 } else { high };
    base.iter()
        .enumerate()
        .map(|(i, frequency)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (1.0 - ramp) + frequency / scaling.factor * ramp
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::presets;

    /// MODEL §3.5: base 10000, factor 40, original context 4096.
    const RELEASED: [f64; 32] = [
        1.0,
        0.749894209,
        0.562341325,
        0.421696503,
        0.316227766,
        0.237137371,
        0.177827941,
        0.133352143,
        0.1,
        0.0749894209,
        0.0562341325,
        0.0390069266,
        0.0268793601,
        0.0183781462,
        0.0124479559,
        0.00833450895,
        0.0055,
        0.00356199749,
        0.0022493653,
        0.00137051364,
        0.000790569415,
        0.000414990398,
        0.000177827941,
        3.33380358e-5,
        2.5e-5,
        1.87473552e-5,
        1.40585331e-5,
        1.05424126e-5,
        7.90569415e-6,
        5.92843426e-6,
        4.44569853e-6,
        3.33380358e-6,
    ];

    fn with_mscale(mscale: Option<f64>, mscale_all_dim: Option<f64>) -> Rotary {
        let mut config = presets::v2();
        config.rope_scaling.iter_mut().for_each(|scaling| {
            scaling.mscale = mscale;
            scaling.mscale_all_dim = mscale_all_dim;
        });
        rotary(&config)
    }

    #[test]
    fn released_frequencies() {
        let found = rotary(&presets::v2());
        assert_eq!(found.frequencies.len(), 32);
        for (found, expected) in found.frequencies.iter().zip(RELEASED) {
            assert!((found / expected - 1.0).abs() < 2e-8, "{found} {expected}");
        }
        assert_eq!(found.factor, 1.0);
        assert!((found.softmax_scale - 0.114_721_39).abs() < 1e-8, "{}", found.softmax_scale);
    }

    #[test]
    fn mscale_of_one() {
        let found = with_mscale(Some(1.0), Some(1.0));
        assert_eq!(found.factor, 1.0);
        assert!((found.softmax_scale - 0.135_233_78).abs() < 1e-8, "{}", found.softmax_scale);
    }

    #[test]
    fn missing_mscales_have_their_own_rules() {
        let plain = 192f32.sqrt().recip();
        let bare = with_mscale(None, None);
        assert!((bare.factor - 1.3688879454).abs() < 1e-9 && (bare.softmax_scale - plain).abs() < 1e-8);
        let zero = with_mscale(Some(0.707), Some(0.0));
        assert!((zero.factor - 1.2608037774).abs() < 1e-9 && (zero.softmax_scale - plain).abs() < 1e-8);
        let different = with_mscale(Some(1.0), Some(0.5));
        assert!((different.factor - 1.3688879454 / 1.1844439727).abs() < 1e-9);
    }

    #[test]
    fn without_scaling_the_embedding_is_plain() {
        let mut config = presets::v2();
        config.rope_scaling = None;
        let found = rotary(&config);
        assert_eq!((found.factor, found.softmax_scale), (1.0, 192f32.sqrt().recip()));
        assert!((found.frequencies[8] - 0.1).abs() < 1e-15 && (found.frequencies[31] - 1.33352143e-4).abs() < 1e-12);
    }
}
