//! The tensors that a configuration expects, with their shapes (MODEL §2).

use crate::names::{self, FfnNames, LayerNames};
use crate::sizes::Part;
use crate::{GateMethod, ModelConfig};

/// One tensor of the architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) part: Part,
}

impl Expected {
    fn new(part: Part, name: String, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), part }
    }
}

/// Every tensor of the architecture, in the order of a token's way; made as it is asked for, layer by layer.
pub(crate) fn expected(config: &ModelConfig) -> impl Iterator<Item = Expected> + '_ {
    let table = [config.vocab, config.hidden];
    let embed = Expected::new(Part::Embed, names::embed(), &table);
    let norm = Expected::new(Part::Norms, names::final_norm(), &[config.hidden]);
    let lm_head = Expected::new(Part::LmHead, names::lm_head(), &table);
    std::iter::once(embed).chain((0..config.layers).flat_map(|index| layer(config, index))).chain([norm, lm_head])
}

fn layer(config: &ModelConfig, index: usize) -> impl Iterator<Item = Expected> + '_ {
    let names = names::layer(index);
    let norms = [names.input_norm(), names.post_attention_norm()];
    let mut tensors: Vec<_> = norms.map(|name| Expected::new(Part::Norms, name, &[config.hidden])).into();
    tensors.extend(attention(config, &names));
    let routed = if config.is_moe(index) {
        tensors.extend(gate(config, &names));
        let width = config.shared_experts.unwrap_or(0) * config.moe_intermediate;
        tensors.extend((width > 0).then(|| ffn(config, Part::Shared, &names.shared(), width)).into_iter().flatten());
        config.routed_experts.unwrap_or(0)
    } else {
        tensors.extend(ffn(config, Part::Dense, &names.dense(), config.intermediate));
        0
    };
    let experts =
        (0..routed).flat_map(move |expert| ffn(config, Part::Routed, &names.expert(expert), config.moe_intermediate));
    tensors.into_iter().chain(experts)
}

fn attention(config: &ModelConfig, names: &LayerNames) -> Vec<Expected> {
    let tensor = |name, shape: &[usize]| Expected::new(Part::Attention, name, shape);
    let queries = config.heads * config.qk_head();
    let mut tensors = match config.q_lora_rank {
        None => vec![tensor(names.q_proj(), &[queries, config.hidden])],
        Some(rank) => vec![
            tensor(names.q_a_proj(), &[rank, config.hidden]),
            tensor(names.q_a_norm(), &[rank]),
            tensor(names.q_b_proj(), &[queries, rank]),
        ],
    };
    let latent = config.kv_lora_rank;
    tensors.extend([
        tensor(names.kv_a_proj(), &[config.cached_elements(), config.hidden]),
        tensor(names.kv_a_norm(), &[latent]),
        tensor(names.kv_b_proj(), &[config.heads * (config.qk_nope + config.v_head), latent]),
        tensor(names.o_proj(), &[config.hidden, config.heads * config.v_head]),
    ]);
    tensors
}

fn gate(config: &ModelConfig, names: &LayerNames) -> Vec<Expected> {
    let experts = config.routed_experts.unwrap_or(0);
    let mut tensors = vec![Expected::new(Part::Gates, names.gate(), &[experts, config.hidden])];
    if config.gate_method == GateMethod::NoauxTc {
        tensors.push(Expected::new(Part::Gates, names.gate_bias(), &[experts]));
    }
    tensors
}

fn ffn(config: &ModelConfig, part: Part, names: &FfnNames, width: usize) -> [Expected; 3] {
    [
        Expected::new(part, names.gate_proj(), &[width, config.hidden]),
        Expected::new(part, names.up_proj(), &[width, config.hidden]),
        Expected::new(part, names.down_proj(), &[config.hidden, width]),
    ]
}
