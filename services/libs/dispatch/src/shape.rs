//! What dispatch has to know of a model.

use conclave_model::{Checkpoint, GateMethod, ModelConfig, ModelError, ModelKind, Scoring};
use conclave_proto::{CellId, GroupId};

/// How a layer's experts are chosen and weighted (model specification, router section).
#[derive(Debug, Clone, PartialEq)]
pub struct GateConfig {
    /// Routed experts `E`.
    pub experts: usize,
    /// Experts a token `K`.
    pub top_k: usize,
    /// Groups of the gate `G`; 1: none.
    pub groups: usize,
    /// Groups a token `M`.
    pub top_groups: usize,
    /// Choice of experts.
    pub method: GateMethod,
    /// Scores from logits.
    pub scoring: Scoring,
    /// Rule for the weights.
    pub rule: WeightRule,
    /// `routed_scaling_factor`
    pub scale: f32,
}

/// How the chosen scores become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightRule {
    /// `w · scale`
    Scaled,
    /// `w / (Σw + 1e-20)`, not scaled: V2 with `norm_topk_prob` and more than one expert a token.
    Normalised,
    /// `w / (Σw + 1e-20) · scale`: V3.
    NormalisedScaled,
}

/// Sizes of the MoE layers of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// `H`
    pub hidden: usize,
    /// Groups that the experts are placed by.
    pub groups: usize,
    /// Which layers are MoE, by absolute index.
    pub moe: Vec<bool>,
    /// The gate.
    pub gate: GateConfig,
    /// `e_score_correction_bias [E]` by absolute layer; empty vectors where there is none.
    pub bias: Vec<Vec<f32>>,
}

impl ModelShape {
    /// The shape of a checkpoint; `None` where every layer is dense.
    ///
    /// # Errors
    /// When a gate's bias is not as it should be.
    pub fn new(checkpoint: &Checkpoint) -> Result<Option<Self>, ModelError> {
        let biases = checkpoint.gate_biases()?;
        Ok(Self::with_biases(checkpoint.config(), biases))
    }

    /// The same of a configuration, with the biases `[E]` of the layers that have one.
    pub fn with_biases(config: &ModelConfig, bias: Vec<Vec<f32>>) -> Option<Self> {
        let experts = config.routed_experts?;
        let rule = match config.kind {
            _ if !config.norm_topk_prob => WeightRule::Scaled,
            ModelKind::DeepseekV3 => WeightRule::NormalisedScaled,
            ModelKind::DeepseekV2 if config.experts_per_token > 1 => WeightRule::Normalised,
            ModelKind::DeepseekV2 => WeightRule::Scaled,
        };
        Some(Self {
            hidden: config.hidden,
            groups: config.cell_groups(),
            moe: (0..config.layers).map(|layer| config.is_moe(layer)).collect(),
            gate: GateConfig {
                experts,
                top_k: config.experts_per_token,
                groups: config.gate_groups,
                top_groups: config.gate_topk_groups,
                method: config.gate_method,
                scoring: config.scoring,
                rule,
                scale: config.routed_scaling_factor,
            },
            bias,
        })
    }

    /// Experts of one group.
    pub fn group_size(&self) -> usize {
        self.gate.experts / self.groups
    }

    /// The group that an expert belongs to.
    pub fn group_of(&self, expert: u32) -> u32 {
        expert / self.group_size() as u32
    }

    /// The cell of a group. A cell covers all MoE layers.
    pub fn cell(&self, group: u32) -> CellId {
        CellId { span: 0, group: GroupId(group) }
    }

    /// Whether `layer` has routed experts.
    pub fn is_moe(&self, layer: u32) -> bool {
        self.moe.get(layer as usize).copied().unwrap_or(false)
    }
}
