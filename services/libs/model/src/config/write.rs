//! [`ModelConfig`] into `config.json`, in the older spelling, which every reader knows.

use serde_json::{Value, json};

use super::{ModelConfig, ModelKind, RopeScaling};

pub(super) fn to_json(config: &ModelConfig) -> String {
    let architecture = match config.kind {
        ModelKind::DeepseekV2 => "DeepseekV2ForCausalLM",
        ModelKind::DeepseekV3 => "DeepseekV3ForCausalLM",
    };
    let mut document = json!({
        "architectures": [architecture],
        "model_type": config.kind.name(),
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": short(config.rms_norm_eps),
        "hidden_act": "silu",
        "attention_bias": false,
        "tie_word_embeddings": false,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.map(rope_scaling),
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope,
        "qk_rope_head_dim": config.qk_rope,
        "v_head_dim": config.v_head,
        "n_routed_experts": config.routed_experts,
        "n_shared_experts": config.shared_experts,
        "bos_token_id": config.bos_token,
        "eos_token_id": match config.eos_tokens.as_slice() {
            [single] => json!(single),
            several => json!(several),
        },
    });
    let object = document.as_object_mut().into_iter();
    object.for_each(|map| map.extend(experts(config)));
    format!("{document:#}\n")
}

fn experts(config: &ModelConfig) -> Vec<(String, Value)> {
    let mut fields = vec![
        ("scoring_func".to_string(), json!(config.scoring.name())),
        ("n_group".to_string(), json!(config.gate_groups)),
        ("topk_group".to_string(), json!(config.gate_topk_groups)),
        ("norm_topk_prob".to_string(), json!(config.norm_topk_prob)),
        ("routed_scaling_factor".to_string(), short(config.routed_scaling_factor)),
        ("moe_layer_freq".to_string(), json!(config.moe_layer_freq)),
    ];
    if config.routed_experts.is_some() {
        fields.push(("topk_method".to_string(), json!(config.gate_method.name())));
        fields.push(("num_experts_per_tok".to_string(), json!(config.experts_per_token)));
        fields.push(("first_k_dense_replace".to_string(), json!(config.first_k_dense)));
        fields.push(("moe_intermediate_size".to_string(), json!(config.moe_intermediate)));
    }
    if let Some(block) = config.quantization {
        let value = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block.rows, block.cols]});
        fields.push(("quantization_config".to_string(), value));
    }
    fields
}

fn rope_scaling(scaling: RopeScaling) -> Value {
    json!({
        "type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    })
}

/// The shortest decimal that reads back as the same single: 1e-6, not 9.999999974752427e-7.
fn short(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
