//! What the fields of a configuration must be to each other (MODEL §1.4).

use super::{ConfigError, GateMethod, ModelConfig, ModelKind, Scoring};
use crate::sizes;

/// Bytes in all that still count with room in 64 bits.
const MAX_BYTES: u128 = 1 << 60;

/// What the sizes must be to each other for the model to have any.
pub(super) fn check_sizes(config: &ModelConfig) -> Result<(), ConfigError> {
    if let Some(experts) = config.routed_experts {
        check_groups(config, experts)?;
    }
    let bytes = sizes::parameters_wide(config).saturating_mul(4);
    if bytes > MAX_BYTES {
        return Err(ConfigError::TooLarge { what: "bytes of all weights in f32", found: bytes, limit: MAX_BYTES });
    }
    Ok(())
}

/// What else is not as it must be.
pub(super) fn check(config: &ModelConfig) -> Vec<ConfigError> {
    let odd = (!config.qk_rope.is_multiple_of(2)).then_some(ConfigError::OddRope { found: config.qk_rope });
    odd.into_iter().chain(config.routed_experts.and_then(|_| check_gate(config).err())).collect()
}

fn check_gate(config: &ModelConfig) -> Result<(), ConfigError> {
    let method = config.gate_method;
    let expected = if method == GateMethod::NoauxTc { Scoring::Sigmoid } else { Scoring::Softmax };
    if config.scoring != expected {
        return Err(ConfigError::GateCombination {
            found: config.scoring.name(),
            method: method.name(),
            expected: expected.name(),
        });
    }
    if method == GateMethod::Greedy && config.gate_groups > 1 {
        return Err(ConfigError::GreedyWithGroups { found: config.gate_groups });
    }
    let factor = config.routed_scaling_factor;
    if config.kind == ModelKind::DeepseekV2 && config.norm_topk_prob && factor != 1.0 {
        return Err(ConfigError::NormWithFactor { factor });
    }
    Ok(())
}

fn check_groups(config: &ModelConfig, experts: usize) -> Result<(), ConfigError> {
    let (groups, kept, chosen) = (config.gate_groups, config.gate_topk_groups, config.experts_per_token);
    if !experts.is_multiple_of(groups) {
        return Err(ConfigError::UnevenGroups { groups, experts });
    }
    if kept > groups {
        return Err(ConfigError::TopkGroups { found: kept, groups });
    }
    if chosen > experts {
        return Err(ConfigError::TooManyExperts { found: chosen, experts });
    }
    let candidates = kept * (experts / groups);
    if candidates < chosen {
        return Err(ConfigError::TooFewCandidates { found: chosen, candidates });
    }
    Ok(())
}
