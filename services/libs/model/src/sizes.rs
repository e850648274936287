//! How large a model is, part by part (MODEL §9).

use conclave_kernels::Dtype;

use crate::{GateMethod, ModelConfig};

/// A part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Embedding table.
    Embed,
    /// MLA projections with their latent norms.
    Attention,
    /// Layer norms and the final norm.
    Norms,
    /// FFN of dense layers.
    Dense,
    /// Shared experts.
    Shared,
    /// Routed experts.
    Routed,
    /// Gates and their biases.
    Gates,
    /// Output projection.
    LmHead,
}

impl Part {
    /// All parts, in the order of a token's way.
    pub const ALL: [Self; 8] =
        [Self::Embed, Self::Attention, Self::Norms, Self::Dense, Self::Shared, Self::Routed, Self::Gates, Self::LmHead];

    /// For people to read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Attention => "attention",
            Self::Norms => "norms",
            Self::Dense => "dense ffn",
            Self::Shared => "shared experts",
            Self::Routed => "routed experts",
            Self::Gates => "gates",
            Self::LmHead => "lm_head",
        }
    }

    /// The part that a tensor of this name belongs to, its scales included; `None` for names of other architectures.
    pub(crate) fn of(name: &str) -> Option<Self> {
        let has = |piece| name.contains(piece);
        match name.strip_prefix("model.") {
            None => name.starts_with("lm_head.").then_some(Self::LmHead),
            Some(rest) if rest.starts_with("embed_tokens.") => Some(Self::Embed),
            Some(_) if has(".self_attn.") => Some(Self::Attention),
            Some(rest) if has("_layernorm.") || rest.starts_with("norm.") => Some(Self::Norms),
            Some(_) if has(".mlp.shared_experts.") => Some(Self::Shared),
            Some(_) if has(".mlp.experts.") => Some(Self::Routed),
            Some(_) if has(".mlp.gate.") => Some(Self::Gates),
            Some(_) => has(".mlp.").then_some(Self::Dense),
        }
    }
}

/// Parameters of a model, per part and per cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    parts: [u64; Part::ALL.len()],
    /// Parameters of one routed expert.
    pub expert: u64,
    /// Parameters of one cell: one expert group over all MoE layers.
    pub cell: u64,
    /// Cells of the model where each spans all MoE layers.
    pub cells: usize,
    /// Parameters that take part in one token: all but the experts not chosen.
    pub activated: u64,
    /// Parameters that decoding one token alone reads: the activated ones, of the embedding one row.
    pub decoded: u64,
    /// Elements of the latent cache a token, over all layers.
    pub latent_elements: u64,
}

impl Sizes {
    /// Counts the parameters of `config`.
    pub fn of(config: &ModelConfig) -> Self {
        let moe_layers = config.moe_layers().count() as u64;
        let parts = parts_wide(config).map(|count| u64::try_from(count).unwrap_or(u64::MAX));
        let experts = config.routed_experts.unwrap_or(0) as u64;
        let cells = config.cell_groups();
        let expert = u64::try_from(expert_wide(config)).unwrap_or(u64::MAX);
        let idle = (experts - config.experts_per_token as u64) * moe_layers * expert;
        let activated = parts.iter().sum::<u64>() - idle;
        Self {
            parts,
            expert,
            cell: experts.checked_div(cells as u64).unwrap_or(0) * moe_layers * expert,
            cells,
            activated,
            decoded: activated - parts[Part::Embed as usize] + config.hidden as u64,
            latent_elements: (config.layers * config.cached_elements()) as u64,
        }
    }

    /// Parameters of one part.
    pub fn part(&self, part: Part) -> u64 {
        self.parts[part as usize]
    }

    /// Parameters of one part as bytes, stored as `dtype`.
    pub fn part_bytes(&self, part: Part, dtype: Dtype) -> u64 {
        self.part(part) * dtype.size() as u64
    }

    /// Parameters in all.
    pub fn total(&self) -> u64 {
        self.parts.iter().sum()
    }

    /// Bytes of one cell, stored as `dtype`.
    pub fn cell_bytes(&self, dtype: Dtype) -> u64 {
        self.cell * dtype.size() as u64
    }

    /// Bytes of latent cache a token, over all layers.
    pub fn latent_bytes(&self, dtype: Dtype) -> u64 {
        self.latent_elements * dtype.size() as u64
    }
}

/// Parameters in all, wide enough for any configuration.
pub(crate) fn parameters_wide(config: &ModelConfig) -> u128 {
    parts_wide(config).iter().sum()
}

/// In the order of [`Part::ALL`].
fn parts_wide(config: &ModelConfig) -> [u128; Part::ALL.len()] {
    let wide = |size: usize| size as u128;
    let hidden = wide(config.hidden);
    let layers = wide(config.layers);
    let moe = wide(config.moe_layers().count());
    let experts = wide(config.routed_experts.unwrap_or(0));
    let table = wide(config.vocab) * hidden;
    let bias = if config.gate_method == GateMethod::NoauxTc { experts } else { 0 };
    let shared = wide(config.shared_experts.unwrap_or(0)) * expert_wide(config);
    [
        table,
        layers * attention_wide(config),
        (2 * layers + 1) * hidden,
        (layers - moe) * 3 * wide(config.intermediate) * hidden,
        moe * shared,
        moe * experts * expert_wide(config),
        moe * (experts * hidden + bias),
        table,
    ]
}

fn expert_wide(config: &ModelConfig) -> u128 {
    3 * config.moe_intermediate as u128 * config.hidden as u128
}

/// One layer's projections and latent norms.
fn attention_wide(config: &ModelConfig) -> u128 {
    let wide = |size: usize| size as u128;
    let (hidden, heads, latent) = (wide(config.hidden), wide(config.heads), wide(config.kv_lora_rank));
    let queries = heads * wide(config.qk_head());
    let query = match config.q_lora_rank.map(wide) {
        None => queries * hidden,
        Some(rank) => rank * hidden + rank + queries * rank,
    };
    let keys = wide(config.cached_elements()) * hidden + latent;
    let expand = heads * wide(config.qk_nope + config.v_head) * latent;
    query + keys + expand + hidden * heads * wide(config.v_head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::presets;
    use crate::tensors::expected;

    fn of(config: &ModelConfig, part: Part) -> u64 {
        Sizes::of(config).part(part)
    }

    #[test]
    fn v2_has_the_published_sizes() {
        let config = presets::v2();
        let sizes = Sizes::of(&config);
        assert_eq!(sizes.total(), 235_741_434_880);
        assert_eq!(sizes.part(Part::Attention), 60 * 149_227_520);
        assert_eq!((sizes.part(Part::Dense), sizes.part(Part::Shared)), (188_743_680, 59 * 47_185_920));
        assert_eq!((sizes.part(Part::Gates), sizes.part(Part::Embed)), (59 * 819_200, 524_288_000));
        assert_eq!((sizes.expert, sizes.cells), (23_592_960, 8));
        assert_eq!(sizes.cell_bytes(Dtype::Bf16), 59 * 20 * 23_592_960 * 2);
        assert_eq!((sizes.latent_elements, sizes.latent_bytes(Dtype::Bf16)), (34_560, 69_120));
        assert_eq!(sizes.activated, 21_375_800_320);
        assert_eq!(sizes.decoded * 2, 41_703_034_880);
    }

    #[test]
    fn v2_lite_has_the_published_sizes() {
        let config = presets::v2_lite();
        let sizes = Sizes::of(&config);
        assert_eq!(sizes.total(), 15_706_484_224);
        assert_eq!(sizes.part(Part::Attention), 27 * 13_763_072);
        assert_eq!((sizes.part(Part::Dense), sizes.expert), (67_239_936, 8_650_752));
        assert_eq!((sizes.cells, sizes.latent_bytes(Dtype::Bf16)), (8, 31_104));
        assert_eq!(sizes.activated, 2_661_150_208);
        assert_eq!(sizes.decoded * 2, 4_902_874_112);
    }

    #[test]
    fn parts_are_the_sums_of_the_expected_tensors() {
        for config in [presets::v2_lite(), presets::tiny()] {
            for part in Part::ALL {
                let elements = |shape: &[usize]| shape.iter().product::<usize>() as u64;
                let tensors = expected(&config).filter(|tensor| tensor.part == part);
                assert_eq!(of(&config, part), tensors.map(|tensor| elements(&tensor.shape)).sum::<u64>(), "{part:?}");
            }
        }
    }

    #[test]
    fn names_tell_the_part() {
        for config in [presets::v2(), presets::v2_lite(), presets::tiny()] {
            for tensor in expected(&config) {
                assert_eq!(Part::of(&tensor.name), Some(tensor.part), "{}", tensor.name);
            }
        }
        assert_eq!(Part::of("model.layers.3.mlp.experts.1.up_proj.weight_scale_inv"), Some(Part::Routed));
        assert_eq!(Part::of("transformer.h.0.attn.weight"), None);
    }
}
