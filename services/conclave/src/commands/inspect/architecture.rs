//! An architecture in the field's words.

use conclave_model::{ModelConfig, RopeScaling};

use crate::commands::print::{together, units::count};

/// Named lines; the words of one figure stay together.
pub fn architecture(config: &ModelConfig) -> Vec<(&'static str, String)> {
    let moe = config.moe_layers().count();
    let mut entries = vec![("model", model(config)), ("attention", attention(config))];
    if let Some(experts) = config.routed_experts {
        let shared = config.shared_experts.map_or(String::new(), |shared| format!(" + {shared} shared"));
        let (width, chosen) = (count(config.moe_intermediate as u64), config.experts_per_token);
        entries.push(("experts", format!("{experts} routed{shared} of width {width}, {chosen} a token")));
        entries.push(("gate", gate(config)));
    }
    if config.layers > moe {
        entries.push(("dense ffn", format!("width {}", count(config.intermediate as u64))));
    }
    entries.push(("rope", rope(config.rope_theta, config.rope_scaling)));
    entries.push(("norm", format!("RMS, eps {:e}", config.rms_norm_eps)));
    if let Some(block) = config.quantization {
        entries.push(("weights", format!("fp8 e4m3 with a scale for each {} × {} block", block.rows, block.cols)));
    }
    entries
}

fn model(config: &ModelConfig) -> String {
    let moe = config.moe_layers().count();
    let layers = match config.layers - moe {
        0 => format!("{moe} MoE layers"),
        dense if moe == 0 => format!("{dense} dense layers"),
        dense => format!("{} layers ({dense} dense, {moe} MoE)", config.layers),
    };
    let sizes = [("hidden", config.hidden), ("vocab", config.vocab), ("context", config.max_position)];
    let sizes = sizes.map(|(name, size)| together(&format!("{name} {}", count(size as u64))));
    format!("{}: {layers}, {}", config.kind.name(), sizes.join(", "))
}

fn attention(config: &ModelConfig) -> String {
    let query = config.q_lora_rank.map_or("no query latent".into(), |rank| format!("query latent {rank}"));
    let latents = [format!("kv latent {}", config.kv_lora_rank), query].map(|latent| together(&latent));
    let (heads, nope, rope, value) = (config.heads, config.qk_nope, config.qk_rope, config.v_head);
    format!("MLA: {heads} heads, key {nope} + {rope} rotary, value {value}; {}", latents.join(", "))
}

fn gate(config: &ModelConfig) -> String {
    let groups = match config.gate_groups {
        1 => String::new(),
        groups => format!(", from at most {} of {groups} groups", config.gate_topk_groups),
    };
    let normalised = if config.norm_topk_prob { "normalised weights" } else { "weights" };
    let (method, scoring, factor) = (config.gate_method.name(), config.scoring.name(), config.routed_scaling_factor);
    format!("{method} over {scoring} scores{groups}; {normalised} × {factor}")
}

fn rope(theta: f64, scaling: Option<RopeScaling>) -> String {
    let Some(yarn) = scaling else { return format!("theta {theta}") };
    let mscale = match (yarn.mscale, yarn.mscale_all_dim) {
        (None, None) => String::new(),
        (Some(one), Some(all)) if one == all => format!(", mscale {one}"),
        (one, all) => {
            let shown = |value: Option<f64>| value.map_or("none".into(), |value| value.to_string());
            format!(", mscale {}, mscale_all_dim {}", shown(one), shown(all))
        }
    };
    let (factor, original) = (yarn.factor, count(yarn.original_max_position as u64));
    format!("theta {theta}; yarn × {factor} over {original}, beta {} to {}{mscale}", yarn.beta_fast, yarn.beta_slow)
}

#[cfg(test)]
mod tests {
    use conclave_model::{GateMethod, ModelKind, Scoring, synth::Preset};

    use super::*;

    #[test]
    fn other_members_of_the_family_are_told_too() {
        let v3 = ModelConfig {
            kind: ModelKind::DeepseekV3,
            gate_method: GateMethod::NoauxTc,
            scoring: Scoring::Sigmoid,
            norm_topk_prob: true,
            q_lora_rank: None,
            rope_scaling: None,
            first_k_dense: 0,
            ..Preset::Tiny.config()
        };
        let lines: Vec<(&str, String)> =
            architecture(&v3).into_iter().map(|(name, value)| (name, value.replace('\u{a0}', " "))).collect();
        let of = |name: &str| lines.iter().find(|(field, _)| *field == name).map(|(_, value)| value.as_str());
        assert!(of("model").unwrap().starts_with("deepseek_v3: 4 MoE layers, hidden 128"), "{lines:?}");
        assert!(of("gate").unwrap().ends_with("3 of 8 groups; normalised weights × 4"), "{lines:?}");
        assert_eq!((of("rope"), of("dense ffn")), (Some("theta 10000"), None));
        assert!(of("attention").unwrap().ends_with("no query latent"), "{lines:?}");
    }
}
