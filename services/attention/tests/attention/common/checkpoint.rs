//! Tiny checkpoints on disk.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use conclave_attention::sampler::draw;
use conclave_model::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tempfile::TempDir;

pub(crate) const VOCAB: usize = 300;
pub(crate) const CONTEXT: usize = 1024;

const HIDDEN: usize = 48;
const HEADS: usize = 3;
const NOPE: usize = 16;
const ROPE: usize = 8;
const VALUE: usize = 12;
const LATENT: usize = 32;
const DENSE: usize = 40;
const EXPERTS: usize = 8;
const EXPERT: usize = 16;

/// What differs between the tiny models.
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) q_lora_rank: Option<usize>,
    pub(crate) experts: bool,
}

/// One dense layer, two with routed experts.
pub(crate) const MOE: Shape = Shape { layers: 3, q_lora_rank: Some(24), experts: true };
/// No routed experts at all, and the other query projection.
pub(crate) const DENSE_ONLY: Shape = Shape { layers: 2, q_lora_rank: None, experts: false };

/// Writes and opens; the files stay as long as the directory does.
pub(crate) fn open(shape: &Shape) -> (TempDir, Arc<Checkpoint>) {
    let dir = tempfile::tempdir().expect("a directory");
    write(shape, dir.path());
    let checkpoint = Checkpoint::open(dir.path().to_str().expect("a path")).expect("opens");
    (dir, Arc::new(checkpoint))
}

fn write(shape: &Shape, dir: &Path) {
    std::fs::write(dir.join("config.json"), config(shape).to_string()).expect("written");
    let data: BTreeMap<String, (Vec<usize>, Vec<u8>)> = tensors(shape)
        .into_iter()
        .enumerate()
        .map(|(index, (name, dims))| (name.clone(), (dims.clone(), values(&name, index as u64, &dims))))
        .collect();
    let views = data.iter().map(|(name, (dims, data))| {
        (name.as_str(), TensorView::new(Dtype::BF16, dims.clone(), data).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("written");
}

fn config(shape: &Shape) -> serde_json::Value {
    let experts = shape.experts.then_some(EXPERTS);
    json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": shape.layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE,
        "kv_lora_rank": LATENT, "q_lora_rank": shape.q_lora_rank,
        "intermediate_size": DENSE, "moe_intermediate_size": EXPERT,
        "n_routed_experts": experts, "n_shared_experts": shape.experts.then_some(2),
        "num_experts_per_tok": shape.experts.then_some(2),
        "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
        "norm_topk_prob": false, "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": CONTEXT,
        "rope_scaling": {
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 256,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0
        },
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": false, "attention_bias": false,
        "torch_dtype": "bfloat16"
    })
}

fn tensors(shape: &Shape) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..shape.layers {
        let mut add =
            |name: &str, dims: &[usize]| tensors.push((format!("model.layers.{layer}.{name}.weight"), dims.into()));
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
        match shape.q_lora_rank {
            None => add("self_attn.q_proj", &[HEADS * (NOPE + ROPE), HIDDEN]),
            Some(rank) => {
                add("self_attn.q_a_proj", &[rank, HIDDEN]);
                add("self_attn.q_a_layernorm", &[rank]);
                add("self_attn.q_b_proj", &[HEADS * (NOPE + ROPE), rank]);
            }
        }
        add("self_attn.kv_a_proj_with_mqa", &[LATENT + ROPE, HIDDEN]);
        add("self_attn.kv_a_layernorm", &[LATENT]);
        add("self_attn.kv_b_proj", &[HEADS * (NOPE + VALUE), LATENT]);
        add("self_attn.o_proj", &[HIDDEN, HEADS * VALUE]);
        let mut ffn = |prefix: &str, inner: usize| {
            add(&format!("mlp.{prefix}gate_proj"), &[inner, HIDDEN]);
            add(&format!("mlp.{prefix}up_proj"), &[inner, HIDDEN]);
            add(&format!("mlp.{prefix}down_proj"), &[HIDDEN, inner]);
        };
        if shape.experts && layer > 0 {
            (0..EXPERTS).for_each(|expert| ffn(&format!("experts.{expert}."), EXPERT));
            ffn("shared_experts.", 2 * EXPERT);
            add("mlp.gate", &[EXPERTS, HIDDEN]);
        } else {
            ffn("", DENSE);
        }
    }
    tensors
}

/// Norm gains around 1, everything else such that activations keep their size.
fn values(name: &str, index: u64, dims: &[usize]) -> Vec<u8> {
    let len: usize = dims.iter().product();
    let scale = 1.7 / (dims[dims.len() - 1] as f64).sqrt();
    let value = |i: usize| {
        let u = 2.0 * draw(1000 + index, 0, i as u32) - 1.0;
        (if name.ends_with("norm.weight") { 1.0 + 0.1 * u } else { u * scale * 1.2 }) as f32
    };
    (0..len).flat_map(|i| ((value(i).to_bits() >> 16) as u16).to_le_bytes()).collect()
}
