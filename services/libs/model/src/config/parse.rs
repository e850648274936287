//! `config.json` into [`ModelConfig`] (MODEL §1).

use super::{BlockQuantization, ConfigError, ModelConfig, ModelKind, gate, rope, rules};
use crate::json::{self, Fields};

/// Largest count of layers, heads, experts and groups.
const MAX_COUNT: u64 = 1 << 16;
/// Largest width.
const MAX_WIDTH: u64 = i32::MAX as u64;

/// What a document says of an architecture, and what is wrong with it.
pub(super) type Read = (ModelConfig, Vec<ConfigError>);

/// Reads a document. Problems that leave the sizes of the model known are gathered; a quantisation among them counts as
/// none.
///
/// # Errors
/// The first problem that does not.
pub(super) fn read(text: &[u8]) -> Result<Read, ConfigError> {
    let document = json::object(text)?;
    let fields = Fields::root(&document);
    let kind = kind(&fields)?;
    let mut problems = check_fixed(&fields);
    let heads = heads(&fields)?;
    let (rope_theta, rope_scaling) = rope::read(&fields)?;
    let gate = gate::read(&fields, kind)?;
    let vocab = width(&fields, "vocab_size")?;
    let config = ModelConfig {
        kind,
        vocab,
        hidden: width(&fields, "hidden_size")?,
        layers: count(&fields, "num_hidden_layers")?,
        heads,
        qk_nope: width(&fields, "qk_nope_head_dim")?,
        qk_rope: width(&fields, "qk_rope_head_dim")?,
        v_head: width(&fields, "v_head_dim")?,
        kv_lora_rank: width(&fields, "kv_lora_rank")?,
        q_lora_rank: nullable(&fields, "q_lora_rank", MAX_WIDTH)?,
        intermediate: width(&fields, "intermediate_size")?,
        routed_experts: gate.experts,
        shared_experts: nullable(&fields, "n_shared_experts", MAX_COUNT)?,
        moe_intermediate: if gate.experts.is_some() { width(&fields, "moe_intermediate_size")? } else { 0 },
        experts_per_token: gate.per_token,
        gate_groups: gate.groups,
        gate_topk_groups: gate.topk_groups,
        gate_method: gate.method,
        scoring: gate.scoring,
        norm_topk_prob: gate.norm,
        routed_scaling_factor: gate.factor,
        first_k_dense: gate.first_k_dense,
        moe_layer_freq: gate.layer_freq,
        rms_norm_eps: positive_f32(&fields, "rms_norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling,
        max_position: width(&fields, "max_position_embeddings")?,
        bos_token: fields.integer("bos_token_id", 0..=vocab as u64 - 1)?.map(|id| id as u32),
        eos_tokens: eos(&fields, vocab)?,
        quantization: quantization(&fields).unwrap_or_else(|error| {
            problems.push(error);
            None
        }),
    };
    rules::check_sizes(&config)?;
    problems.extend(rules::check(&config));
    Ok((config, problems))
}

fn kind(fields: &Fields<'_>) -> Result<ModelKind, ConfigError> {
    match fields.required_text("model_type")? {
        "deepseek_v2" => Ok(ModelKind::DeepseekV2),
        "deepseek_v3" => Ok(ModelKind::DeepseekV3),
        other => Err(ConfigError::ModelType { found: json::quote(other) }),
    }
}

/// Fields that have one value only.
fn check_fixed(fields: &Fields<'_>) -> Vec<ConfigError> {
    let activation = match fields.required_text("hidden_act") {
        Ok("silu") => None,
        Ok(other) => Some(ConfigError::HiddenAct { found: json::quote(other) }),
        Err(error) => Some(error.into()),
    };
    let off = |key, refusal| match fields.flag(key) {
        Ok(set) => (set == Some(true)).then_some(refusal),
        Err(error) => Some(error.into()),
    };
    let flags = [
        off("attention_bias", ConfigError::AttentionBias),
        off("mlp_bias", ConfigError::MlpBias),
        off("tie_word_embeddings", ConfigError::TiedEmbeddings),
    ];
    activation.into_iter().chain(flags.into_iter().flatten()).collect()
}

fn heads(fields: &Fields<'_>) -> Result<usize, ConfigError> {
    let heads = fields.required_integer("num_attention_heads", 1..=MAX_COUNT)?;
    let kv = fields.integer("num_key_value_heads", 1..=MAX_COUNT)?.unwrap_or(heads);
    if kv != heads {
        return Err(ConfigError::KeyValueHeads { found: kv, expected: heads });
    }
    Ok(heads as usize)
}

pub(super) fn count(fields: &Fields<'_>, key: &str) -> Result<usize, ConfigError> {
    Ok(fields.required_integer(key, 1..=MAX_COUNT)? as usize)
}

fn width(fields: &Fields<'_>, key: &str) -> Result<usize, ConfigError> {
    Ok(fields.required_integer(key, 1..=MAX_WIDTH)? as usize)
}

/// A count that must be given, where null and 0 mean that the model has no such part: the original class has other
/// defaults than null for some of these, so that an absent key says nothing.
pub(super) fn nullable(fields: &Fields<'_>, key: &str, max: u64) -> Result<Option<usize>, ConfigError> {
    if !fields.contains(key) {
        return Err(fields.missing(key, "an integer or null").into());
    }
    let value = fields.integer(key, 0..=max)?.unwrap_or(0);
    Ok((value > 0).then_some(value as usize))
}

/// A number above 0 that stays so in single precision.
pub(super) fn positive_f32(fields: &Fields<'_>, key: &str, default: f64) -> Result<f32, ConfigError> {
    let number = fields.number(key)?.unwrap_or(default);
    let single = number as f32;
    if single > 0.0 && single.is_finite() {
        return Ok(single);
    }
    Err(fields.out_of_range(key, number, "a number above 0 within single precision").into())
}

/// One token id or a list of them; absent and null are an empty list.
fn eos(fields: &Fields<'_>, vocab: usize) -> Result<Vec<u32>, ConfigError> {
    let ids = json::token_ids(fields, "eos_token_id")?;
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(id) => Err(ConfigError::TokenId { field: fields.path("eos_token_id"), found: *id, vocab }),
        None => Ok(ids),
    }
}

/// Only what V3 and R1 carry: FP8 e4m3 with two-dimensional blocks.
fn quantization(fields: &Fields<'_>) -> Result<Option<BlockQuantization>, ConfigError> {
    let Some(given) = fields.object("quantization_config")? else { return Ok(None) };
    let refuse = |field: &str, expected| ConfigError::Quantization {
        field: field.into(),
        found: given.value(field).map_or("nothing".into(), json::describe),
        expected,
    };
    if given.text("quant_method")? != Some("fp8") {
        return Err(refuse("quant_method", "\"fp8\""));
    }
    if given.text("fmt")? != Some("e4m3") {
        return Err(refuse("fmt", "\"e4m3\""));
    }
    let block = given.array("weight_block_size")?.map(Vec::as_slice);
    let Some([rows, cols]) = block else {
        return Err(refuse("weight_block_size", "two integers"));
    };
    let path = given.path("weight_block_size");
    let side = |value| json::integer(&path, value, 1..=MAX_COUNT).map(|side| side as usize);
    Ok(Some(BlockQuantization { rows: side(rows)?, cols: side(cols)? }))
}
