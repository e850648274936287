//! Configurations of released models (MODEL §1.1) and of one for tests.

use super::{GateMethod, ModelConfig, ModelKind, RopeScaling, Scoring};

/// DeepSeek-V2, 236B.
pub(crate) fn v2() -> ModelConfig {
    ModelConfig {
        kind: ModelKind::DeepseekV2,
        vocab: 102400,
        hidden: 5120,
        layers: 60,
        heads: 128,
        qk_nope: 128,
        qk_rope: 64,
        v_head: 128,
        kv_lora_rank: 512,
        q_lora_rank: Some(1536),
        intermediate: 12288,
        routed_experts: Some(160),
        shared_experts: Some(2),
        moe_intermediate: 1536,
        experts_per_token: 6,
        gate_groups: 8,
        gate_topk_groups: 3,
        gate_method: GateMethod::GroupLimitedGreedy,
        scoring: Scoring::Softmax,
        norm_topk_prob: false,
        routed_scaling_factor: 16.0,
        first_k_dense: 1,
        moe_layer_freq: 1,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        rope_scaling: Some(yarn(40.0, 4096)),
        max_position: 163840,
        bos_token: Some(100000),
        eos_tokens: vec![100001],
        quantization: None,
    }
}

/// DeepSeek-V2-Lite, 16B.
pub(crate) fn v2_lite() -> ModelConfig {
    ModelConfig {
        hidden: 2048,
        layers: 27,
        heads: 16,
        q_lora_rank: None,
        intermediate: 10944,
        routed_experts: Some(64),
        moe_intermediate: 1408,
        gate_groups: 1,
        gate_topk_groups: 1,
        gate_method: GateMethod::Greedy,
        routed_scaling_factor: 1.0,
        ..v2()
    }
}

/// DeepSeek-V3, 671B, in bf16.
pub(crate) fn v3() -> ModelConfig {
    ModelConfig {
        kind: ModelKind::DeepseekV3,
        vocab: 129280,
        hidden: 7168,
        layers: 61,
        intermediate: 18432,
        routed_experts: Some(256),
        shared_experts: Some(1),
        moe_intermediate: 2048,
        experts_per_token: 8,
        gate_groups: 8,
        gate_topk_groups: 4,
        gate_method: GateMethod::NoauxTc,
        scoring: Scoring::Sigmoid,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        first_k_dense: 3,
        rope_scaling: Some(RopeScaling { mscale: Some(1.0), mscale_all_dim: Some(1.0), ..yarn(40.0, 4096) }),
        bos_token: Some(0),
        eos_tokens: vec![1],
        ..v2()
    }
}

/// V2's structure, 8 groups of 4 experts among them, in a few megabytes.
pub(crate) fn tiny() -> ModelConfig {
    ModelConfig {
        vocab: 512,
        hidden: 128,
        layers: 4,
        heads: 4,
        qk_nope: 32,
        qk_rope: 16,
        v_head: 32,
        kv_lora_rank: 64,
        q_lora_rank: Some(48),
        intermediate: 256,
        routed_experts: Some(32),
        moe_intermediate: 64,
        routed_scaling_factor: 4.0,
        rope_scaling: Some(yarn(8.0, 256)),
        max_position: 2048,
        bos_token: Some(0),
        eos_tokens: vec![1],
        ..v2()
    }
}

fn yarn(factor: f64, original_max_position: usize) -> RopeScaling {
    RopeScaling {
        factor,
        original_max_position,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(0.707),
        mscale_all_dim: Some(0.707),
    }
}
