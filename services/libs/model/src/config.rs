//! The model's architecture, as `config.json` states it.

mod error;
mod gate;
mod parse;
pub(crate) mod presets;
mod rope;
mod rules;
#[cfg(test)]
mod tests;
mod write;

use std::path::Path;

use crate::ModelError;
use crate::files;

pub use error::ConfigError;

/// Which family member a checkpoint is; decides the rules that differ between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// `deepseek_v2`: V2, V2-Lite, V2.5, Coder-V2.
    DeepseekV2,
    /// `deepseek_v3`: V3, R1.
    DeepseekV3,
}

impl ModelKind {
    /// As `model_type` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
        }
    }
}

/// How a token's experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateMethod {
    /// The best K of all.
    Greedy,
    /// The best K of the M groups with the highest maximum.
    GroupLimitedGreedy,
    /// V3: bias-corrected, groups by the sum of their two best.
    NoauxTc,
}

impl GateMethod {
    /// As `topk_method` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Greedy => "greedy",
            Self::GroupLimitedGreedy => "group_limited_greedy",
            Self::NoauxTc => "noaux_tc",
        }
    }
}

/// How gate logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each on its own.
    Sigmoid,
}

impl Scoring {
    /// As `scoring_func` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Sigmoid => "sigmoid",
        }
    }
}

/// YaRN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeScaling {
    /// Context extension factor.
    pub factor: f64,
    /// Context before the extension.
    pub original_max_position: usize,
    /// Fast bound of the ramp.
    pub beta_fast: f64,
    /// Slow bound of the ramp.
    pub beta_slow: f64,
    /// As given; missing stays missing (the rules for it differ by use).
    pub mscale: Option<f64>,
    /// As given.
    pub mscale_all_dim: Option<f64>,
}

/// FP8 (e4m3) weights with one scale per block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockQuantization {
    /// Output rows of a block.
    pub rows: usize,
    /// Input columns of a block.
    pub cols: usize,
}

/// What a configuration says of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenIds {
    /// Ids are below it.
    pub(crate) vocab: usize,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
}

impl TokenIds {
    /// Where there is no configuration to ask: more ids than any vocabulary has.
    pub(crate) fn unknown() -> Self {
        Self { vocab: 1 << 22, bos: None, eos: Vec::new() }
    }
}

/// The architecture of a checkpoint: checked, both spellings read, defaults resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family member.
    pub kind: ModelKind,
    /// Rows of the embedding and of lm_head.
    pub vocab: usize,
    /// `H`
    pub hidden: usize,
    /// `L`
    pub layers: usize,
    /// `n`
    pub heads: usize,
    /// `dn`
    pub qk_nope: usize,
    /// `dr`
    pub qk_rope: usize,
    /// `dv`
    pub v_head: usize,
    /// `r`
    pub kv_lora_rank: usize,
    /// `rq`; `None`: one query projection.
    pub q_lora_rank: Option<usize>,
    /// `I`, of dense layers.
    pub intermediate: usize,
    /// `E`; `None`: every layer is dense.
    pub routed_experts: Option<usize>,
    /// `S`
    pub shared_experts: Option<usize>,
    /// `Im`
    pub moe_intermediate: usize,
    /// `K`
    pub experts_per_token: usize,
    /// `G` of the gate (1: no groups).
    pub gate_groups: usize,
    /// `M`
    pub gate_topk_groups: usize,
    /// Choice of experts.
    pub gate_method: GateMethod,
    /// Gate scores.
    pub scoring: Scoring,
    /// Whether the chosen weights are normalised.
    pub norm_topk_prob: bool,
    /// Factor on the weights.
    pub routed_scaling_factor: f32,
    /// First layer that may be MoE.
    pub first_k_dense: usize,
    /// Every which layer is MoE, by absolute index.
    pub moe_layer_freq: usize,
    /// Of the layer norms and the final norm.
    pub rms_norm_eps: f32,
    /// Rotary base.
    pub rope_theta: f64,
    /// `None`: plain rotary embedding.
    pub rope_scaling: Option<RopeScaling>,
    /// Longest context.
    pub max_position: usize,
    /// Beginning of sequence.
    pub bos_token: Option<u32>,
    /// End of sequence; one or several.
    pub eos_tokens: Vec<u32>,
    /// Block-scaled FP8 weights; `None`: weights as they are.
    pub quantization: Option<BlockQuantization>,
}

impl ModelConfig {
    /// Parses and checks the text of a `config.json`; both spellings of MODEL §1.3 are read.
    ///
    /// # Errors
    /// Names the field, what was found and what was expected.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        let (config, problems) = parse::read(text)?;
        problems.into_iter().next().map_or(Ok(config), Err)
    }

    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// When the file cannot be read, or as for [`ModelConfig::parse`].
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        let (config, problems) = Self::survey(dir)?;
        problems.into_iter().next().map_or(Ok(config), Err)
    }

    /// As [`ModelConfig::read`]; problems that leave the sizes known are gathered.
    pub(crate) fn survey(dir: &Path) -> Result<(Self, Vec<ModelError>), ModelError> {
        let path = dir.join("config.json");
        let text = files::read(&path)?;
        let named = |error| ModelError::Config { path: path.clone(), error };
        let (config, problems) = parse::read(&text).map_err(named)?;
        Ok((config, problems.into_iter().map(named).collect()))
    }

    /// The configuration as the text of a `config.json`.
    pub fn to_json(&self) -> String {
        write::to_json(self)
    }

    pub(crate) fn tokens(&self) -> TokenIds {
        TokenIds { vocab: self.vocab, bos: self.bos_token, eos: self.eos_tokens.clone() }
    }

    /// Layers with routed experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers).filter(|layer| self.is_moe(*layer))
    }

    /// Elements of one query or key head, `dq = dn + dr`.
    pub fn qk_head(&self) -> usize {
        self.qk_nope + self.qk_rope
    }

    /// Elements cached a token and layer: the latent and the shared rotary key.
    pub fn cached_elements(&self) -> usize {
        self.kv_lora_rank + self.qk_rope
    }

    /// Whether layer `layer` has routed experts (the original rule: modulo on the absolute index).
    pub fn is_moe(&self, layer: usize) -> bool {
        self.routed_experts.is_some() && layer >= self.first_k_dense && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// Expert groups of the cells: the gate's groups, or at most 8 equal blocks where the gate has none.
    pub fn cell_groups(&self) -> usize {
        match self.routed_experts {
            None => 0,
            Some(_) if self.gate_groups > 1 => self.gate_groups,
            Some(experts) => (1..=8).rev().find(|groups| experts.is_multiple_of(*groups)).unwrap_or(1),
        }
    }
}
