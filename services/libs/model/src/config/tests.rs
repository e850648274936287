//! Every rejection by its name, both spellings, defaults, and no panic on anything.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::JsonError;

/// The released V2 (MODEL §1.1).
fn v2() -> Value {
    json!({
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "n_group": 8,
        "topk_group": 3, "scoring_func": "softmax", "norm_topk_prob": false, "routed_scaling_factor": 16.0,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 163840,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
        "bos_token_id": 100000, "eos_token_id": 100001, "tie_word_embeddings": false, "attention_bias": false,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "aux_loss_alpha": 0.001, "use_cache": true,
    })
}

/// The released V3 (MODEL §1.1).
fn v3() -> Value {
    let mut config = v2();
    merge(
        &mut config,
        json!({
            "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "topk_method": "noaux_tc",
            "topk_group": 4, "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
            "bos_token_id": 0, "eos_token_id": 1,
            "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                "activation_scheme": "dynamic"},
        }),
    );
    config
}

fn merge(config: &mut Value, change: Value) {
    let Value::Object(change) = change else { panic!("a change is an object") };
    config.as_object_mut().unwrap().extend(change);
}

fn without(mut config: Value, keys: &[&str]) -> Value {
    keys.iter().for_each(|key| drop(config.as_object_mut().unwrap().remove(*key)));
    config
}

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::parse(config.to_string().as_bytes())
}

fn changed(change: Value) -> Result<ModelConfig, ConfigError> {
    let mut config = v2();
    merge(&mut config, change);
    parse(&config)
}

fn refused(change: Value) -> ConfigError {
    changed(change.clone()).expect_err(&change.to_string())
}

#[test]
fn the_released_v2_is_read() {
    let config = parse(&v2()).unwrap();
    assert_eq!((config.kind, config.hidden, config.layers, config.heads), (ModelKind::DeepseekV2, 5120, 60, 128));
    assert_eq!((config.routed_experts, config.shared_experts, config.experts_per_token), (Some(160), Some(2), 6));
    assert_eq!((config.gate_groups, config.gate_topk_groups), (8, 3));
    assert_eq!((config.gate_method, config.scoring), (GateMethod::GroupLimitedGreedy, Scoring::Softmax));
    assert_eq!((config.q_lora_rank, config.routed_scaling_factor, config.rms_norm_eps), (Some(1536), 16.0, 1e-6));
    assert_eq!((config.bos_token, config.eos_tokens.as_slice()), (Some(100000), [100001].as_slice()));
    assert_eq!(config.rope_scaling.unwrap().mscale, Some(0.707));
    assert_eq!(config.moe_layers().count(), 59);
}

#[test]
fn v3_is_read() {
    let config = parse(&v3()).unwrap();
    assert_eq!((config.gate_method, config.scoring), (GateMethod::NoauxTc, Scoring::Sigmoid));
    assert_eq!(config.quantization, Some(BlockQuantization { rows: 128, cols: 128 }));
}

#[test]
fn v3_defaults_follow_the_model_type() {
    let config = parse(&without(v3(), &["scoring_func", "topk_method"])).unwrap();
    assert_eq!((config.gate_method, config.scoring), (GateMethod::NoauxTc, Scoring::Sigmoid));
}

#[test]
fn both_spellings_are_one() {
    let mut newer = without(v2(), &["rope_theta", "rope_scaling", "torch_dtype", "scoring_func", "moe_layer_freq"]);
    merge(
        &mut newer,
        json!({"dtype": "bfloat16", "head_dim": 64, "rope_parameters": {"rope_type": "yarn", "type": "yarn",
            "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    );
    assert_eq!(parse(&newer).unwrap(), parse(&v2()).unwrap());
}

#[test]
fn named_defaults_are_filled_in() {
    let keys = ["moe_layer_freq", "norm_topk_prob", "scoring_func", "routed_scaling_factor", "rope_theta"];
    let more =
        ["rms_norm_eps", "tie_word_embeddings", "attention_bias", "num_key_value_heads", "n_group", "topk_group"];
    let mut config = without(without(v2(), &keys), &more);
    merge(&mut config, json!({"topk_method": "greedy", "rope_scaling": null}));
    let config = parse(&config).unwrap();
    assert_eq!((config.moe_layer_freq, config.norm_topk_prob, config.scoring), (1, false, Scoring::Softmax));
    assert_eq!((config.routed_scaling_factor, config.rope_theta, config.rms_norm_eps), (1.0, 10000.0, 1e-6));
    assert_eq!((config.gate_groups, config.gate_topk_groups, config.rope_scaling), (1, 1, None));
}

#[test]
fn nulls_mean_none_and_one() {
    let config = changed(json!({"q_lora_rank": null, "n_shared_experts": null, "n_group": null, "topk_group": null,
        "topk_method": "gready"}))
    .unwrap();
    assert_eq!((config.q_lora_rank, config.shared_experts, config.gate_groups), (None, None, 1));
    assert_eq!(config.gate_method, GateMethod::Greedy);
    let dense = without(v2(), &["moe_intermediate_size", "num_experts_per_tok", "first_k_dense_replace"]);
    let mut dense = without(dense, &["topk_method", "n_group", "topk_group"]);
    merge(&mut dense, json!({"n_routed_experts": null}));
    let dense = parse(&dense).unwrap();
    assert_eq!((dense.moe_layers().count(), dense.cell_groups()), (0, 0));
}

#[test]
fn structural_keys_are_required() {
    for key in [
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "topk_method",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
        "hidden_act",
    ] {
        let error = parse(&without(v2(), &[key])).expect_err(key);
        assert!(
            matches!(&error, ConfigError::Json(JsonError::Missing { field, .. }) if field == key),
            "{key}: {error}"
        );
    }
}

#[test]
fn ends_of_sequence_may_be_several() {
    assert_eq!(changed(json!({"eos_token_id": [1, 2]})).unwrap().eos_tokens, [1, 2]);
    let error = refused(json!({"eos_token_id": [1, 102400]}));
    assert_eq!(error.to_string(), "eos_token_id: found 102400, expected less than vocab_size = 102400");
}

/// Asserts the variant and that the message names all of `words`.
macro_rules! refusal {
    ($name:ident, $change:tt, $variant:pat, [$($word:literal),+]) => {
        #[test]
        fn $name() {
            let error = refused(json!($change));
            assert!(matches!(error, $variant), "{error:?}");
            let message = error.to_string();
            $(assert!(message.contains($word), "{message}: {}", $word);)+
        }
    };
}

refusal!(other_family, {"model_type": "llama"}, ConfigError::ModelType { .. }, ["model_type", "\"llama\"", "deepseek_v2"]);
refusal!(other_activation, {"hidden_act": "gelu"}, ConfigError::HiddenAct { .. }, ["hidden_act", "\"gelu\"", "\"silu\""]);
refusal!(attention_bias, {"attention_bias": true}, ConfigError::AttentionBias, ["attention_bias", "true", "false"]);
refusal!(mlp_bias, {"mlp_bias": true}, ConfigError::MlpBias, ["mlp_bias", "true", "false"]);
refusal!(tied, {"tie_word_embeddings": true}, ConfigError::TiedEmbeddings, ["tie_word_embeddings", "true", "false"]);
refusal!(grouped_keys, {"num_key_value_heads": 8}, ConfigError::KeyValueHeads { .. }, ["num_key_value_heads", "8", "128"]);
refusal!(rope_type, {"rope_scaling": {"type": "linear", "factor": 2}}, ConfigError::RopeType { .. },
    ["rope_scaling.type", "\"linear\"", "yarn"]);
refusal!(rope_types_disagree, {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, ConfigError::RopeType { .. },
    ["rope_scaling.type", "\"linear\""]);
refusal!(rope_option, {"rope_scaling": {"type": "yarn", "attention_factor": 2}}, ConfigError::RopeOption { .. },
    ["rope_scaling.attention_factor", "2", "absent"]);
refusal!(rope_conflict, {"rope_parameters": {"rope_type": "default"}}, ConfigError::RopeConflict { .. },
    ["rope_parameters", "None", "40"]);
refusal!(rope_factor, {"rope_scaling": {"type": "yarn", "factor": -1, "original_max_position_embeddings": 4096}},
    ConfigError::RopeFactor { .. }, ["rope_scaling.factor", "-1", "above 0"]);
refusal!(odd_rope, {"qk_rope_head_dim": 63}, ConfigError::OddRope { .. }, ["qk_rope_head_dim", "63", "even"]);
refusal!(topk_method, {"topk_method": "random"}, ConfigError::TopkMethod { .. }, ["topk_method", "\"random\"", "greedy"]);
refusal!(scoring, {"scoring_func": "tanh"}, ConfigError::ScoringFunc { .. }, ["scoring_func", "\"tanh\"", "softmax"]);
refusal!(softmax_noaux, {"topk_method": "noaux_tc"}, ConfigError::GateCombination { .. },
    ["scoring_func", "softmax", "noaux_tc", "sigmoid"]);
refusal!(sigmoid_greedy, {"scoring_func": "sigmoid"}, ConfigError::GateCombination { .. },
    ["scoring_func", "sigmoid", "group_limited_greedy", "softmax"]);
refusal!(greedy_groups, {"topk_method": "greedy"}, ConfigError::GreedyWithGroups { .. }, ["n_group", "8", "greedy", "1"]);
refusal!(gready_groups, {"topk_method": "gready"}, ConfigError::GreedyWithGroups { .. }, ["n_group", "8"]);
refusal!(uneven_groups, {"n_group": 7}, ConfigError::UnevenGroups { .. }, ["n_group", "7", "160"]);
refusal!(topk_groups, {"topk_group": 9}, ConfigError::TopkGroups { .. }, ["topk_group", "9", "n_group = 8"]);
refusal!(too_few_candidates, {"n_group": 80, "topk_group": 2}, ConfigError::TooFewCandidates { .. },
    ["num_experts_per_tok", "6", "4"]);
refusal!(too_many_experts, {"num_experts_per_tok": 161}, ConfigError::TooManyExperts { .. },
    ["num_experts_per_tok", "161", "160"]);
refusal!(layer_freq, {"moe_layer_freq": 0}, ConfigError::MoeLayerFreq { .. }, ["moe_layer_freq", "0", "1"]);
refusal!(norm_with_factor, {"norm_topk_prob": true}, ConfigError::NormWithFactor { .. },
    ["norm_topk_prob", "true", "16", "1"]);
refusal!(quantization_method, {"quantization_config": {"quant_method": "gptq"}}, ConfigError::Quantization { .. },
    ["quantization_config.quant_method", "\"gptq\"", "fp8"]);
refusal!(quantization_format, {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
    ConfigError::Quantization { .. }, ["quantization_config.fmt", "\"e5m2\"", "e4m3"]);
refusal!(quantization_block, {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128]}},
    ConfigError::Quantization { .. }, ["quantization_config.weight_block_size", "array of 1", "two"]);
refusal!(wrong_type, {"hidden_size": "large"}, ConfigError::Json(JsonError::WrongType { .. }),
    ["hidden_size", "\"large\"", "integer"]);
refusal!(fraction, {"hidden_size": 5120.5}, ConfigError::Json(JsonError::OutOfRange { .. }), ["hidden_size", "5120.5"]);
refusal!(negative, {"num_hidden_layers": -3}, ConfigError::Json(JsonError::OutOfRange { .. }),
    ["num_hidden_layers", "-3", "1..=65536"]);
refusal!(zero, {"vocab_size": 0}, ConfigError::Json(JsonError::OutOfRange { .. }), ["vocab_size", "0"]);
refusal!(huge, {"hidden_size": 18446744073709551615u64}, ConfigError::Json(JsonError::OutOfRange { .. }),
    ["hidden_size", "18446744073709551615"]);
refusal!(bos_past_vocab, {"bos_token_id": 102400}, ConfigError::Json(JsonError::OutOfRange { .. }),
    ["bos_token_id", "102400", "0..=102399"]);
refusal!(rope_theta, {"rope_theta": 1}, ConfigError::Json(JsonError::OutOfRange { .. }), ["rope_theta", "above 1"]);
refusal!(vanishing_eps, {"rms_norm_eps": 1e-60}, ConfigError::Json(JsonError::OutOfRange { .. }), ["rms_norm_eps"]);
refusal!(huge_products, {"hidden_size": 2147483647, "moe_intermediate_size": 2147483647, "n_routed_experts": 65536},
    ConfigError::TooLarge { .. }, ["bytes of all weights", "at most"]);

#[test]
fn malformed_text_names_its_place() {
    let error = ModelConfig::parse(b"{\n\"model_type\": }").unwrap_err();
    assert!(matches!(error, ConfigError::Json(JsonError::Malformed { line: 2, .. })), "{error}");
}

#[test]
fn what_is_written_reads_back() {
    for config in [parse(&v2()).unwrap(), parse(&v3()).unwrap()] {
        assert_eq!(ModelConfig::parse(config.to_json().as_bytes()).unwrap(), config);
    }
}

/// A value as a broken or hostile file may hold it.
#[test]
fn numbers_come_back_to_the_last_bit() {
    // The nearest double has a shortest decimal that a hasty parser reads as its neighbour.
    let theta = 918_545_305_477_421_633_u64;
    let mut config = v2();
    config["rope_theta"] = theta.into();
    let config = parse(&config).unwrap();
    assert_eq!(config.rope_theta, theta as f64);
    assert_eq!(ModelConfig::parse(config.to_json().as_bytes()).unwrap(), config);
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3i64..200).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!({"type": "yarn", "factor": 1e308, "original_max_position_embeddings": 1})),
    ]
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = ModelConfig::parse(&bytes);
    }

    #[test]
    fn no_change_panics_and_what_passes_is_sound(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4)
    ) {
        let mut config = v2();
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (key, value) in changes {
            config[key.get(&keys)] = value;
        }
        if let Ok(config) = parse(&config) {
            let sizes = crate::sizes::Sizes::of(&config);
            prop_assert!(sizes.activated <= sizes.total());
            let rotary = crate::rotary(&config);
            prop_assert!(rotary.frequencies.iter().all(|frequency| frequency.is_finite()));
            prop_assert!(config.cell_groups() <= config.routed_experts.unwrap_or(0));
            prop_assert_eq!(ModelConfig::parse(config.to_json().as_bytes()).unwrap(), config);
        }
    }
}
