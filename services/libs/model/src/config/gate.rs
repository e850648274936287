//! The fields that decide how experts are chosen.

use super::parse::{count, nullable, positive_f32};
use super::{ConfigError, GateMethod, ModelKind, Scoring};
use crate::json::{self, Fields};

/// The gate and which layers have one.
pub(super) struct Gate {
    pub(super) experts: Option<usize>,
    pub(super) per_token: usize,
    pub(super) groups: usize,
    pub(super) topk_groups: usize,
    pub(super) method: GateMethod,
    pub(super) scoring: Scoring,
    pub(super) norm: bool,
    pub(super) factor: f32,
    pub(super) first_k_dense: usize,
    pub(super) layer_freq: usize,
}

const MAX_COUNT: u64 = 1 << 16;

pub(super) fn read(fields: &Fields<'_>, kind: ModelKind) -> Result<Gate, ConfigError> {
    let experts = nullable(fields, "n_routed_experts", MAX_COUNT)?;
    let groups = fields.integer("n_group", 1..=MAX_COUNT)?.unwrap_or(1) as usize;
    let topk_groups = fields.integer("topk_group", 1..=MAX_COUNT)?.unwrap_or(1) as usize;
    let mut gate = Gate {
        experts,
        per_token: 0,
        groups,
        topk_groups,
        method: GateMethod::Greedy,
        scoring: scoring(fields, kind)?,
        norm: fields.flag("norm_topk_prob")?.unwrap_or(false),
        factor: positive_f32(fields, "routed_scaling_factor", 1.0)?,
        first_k_dense: 0,
        layer_freq: layer_freq(fields)?,
    };
    if experts.is_some() {
        gate.per_token = count(fields, "num_experts_per_tok")?;
        gate.first_k_dense = fields.required_integer("first_k_dense_replace", 0..=MAX_COUNT)? as usize;
        gate.method = method(fields, kind)?;
    }
    Ok(gate)
}

/// V3 checkpoints written by newer libraries do not name their only method.
fn method(fields: &Fields<'_>, kind: ModelKind) -> Result<GateMethod, ConfigError> {
    match fields.text("topk_method")? {
        Some("greedy" | "gready") => Ok(GateMethod::Greedy),
        Some("group_limited_greedy") => Ok(GateMethod::GroupLimitedGreedy),
        Some("noaux_tc") => Ok(GateMethod::NoauxTc),
        Some(other) => Err(ConfigError::TopkMethod { found: json::quote(other) }),
        None if kind == ModelKind::DeepseekV3 => Ok(GateMethod::NoauxTc),
        None => Err(fields.missing("topk_method", "\"greedy\" or \"group_limited_greedy\"").into()),
    }
}

fn scoring(fields: &Fields<'_>, kind: ModelKind) -> Result<Scoring, ConfigError> {
    match (fields.text("scoring_func")?, kind) {
        (Some("softmax"), _) | (None, ModelKind::DeepseekV2) => Ok(Scoring::Softmax),
        (Some("sigmoid"), _) | (None, ModelKind::DeepseekV3) => Ok(Scoring::Sigmoid),
        (Some(other), _) => Err(ConfigError::ScoringFunc { found: json::quote(other) }),
    }
}

fn layer_freq(fields: &Fields<'_>) -> Result<usize, ConfigError> {
    match fields.value("moe_layer_freq") {
        Some(value) if value.as_f64().is_some_and(|freq| freq < 1.0) => {
            Err(ConfigError::MoeLayerFreq { found: json::describe(value) })
        }
        _ => Ok(fields.integer("moe_layer_freq", 1..=MAX_COUNT)?.unwrap_or(1) as usize),
    }
}
