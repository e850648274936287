//! Small checkpoints for tests.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::config::presets;
use crate::tensors::expected;
use crate::{Checkpoint, ModelConfig};

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

/// A configuration of a few kilobytes, the last of its two layers MoE.
pub(crate) fn small() -> ModelConfig {
    ModelConfig {
        vocab: 24,
        hidden: 8,
        layers: 2,
        heads: 2,
        qk_nope: 4,
        qk_rope: 2,
        v_head: 4,
        kv_lora_rank: 6,
        q_lora_rank: None,
        intermediate: 12,
        routed_experts: Some(4),
        moe_intermediate: 4,
        experts_per_token: 2,
        gate_groups: 2,
        gate_topk_groups: 2,
        ..presets::tiny()
    }
}

/// Every tensor of `config` in bf16: element `i` of tensor `t` is a bit pattern of both.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<Stored> {
    let stored = |(index, tensor): (usize, crate::tensors::Expected)| {
        let elements: usize = tensor.shape.iter().product();
        let data = (0..elements).flat_map(|i| ((0x3c00 + 37 * index + i) as u16).to_le_bytes()).collect();
        Stored { name: tensor.name, dtype: "BF16", shape: tensor.shape, data }
    };
    expected(config).enumerate().map(stored).collect()
}

/// The bytes of a safetensors file.
pub(crate) fn file(tensors: &[Stored]) -> Vec<u8> {
    let mut header = Map::new();
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.data.len();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let data = tensors.iter().flat_map(|tensor| tensor.data.iter().copied());
    (header.len() as u64).to_le_bytes().into_iter().chain(header.into_bytes()).chain(data).collect()
}

/// A checkpoint in one file.
pub(crate) fn write(dir: &Path, config: &ModelConfig, tensors: &[Stored]) {
    fs::write(dir.join("config.json"), config.to_json()).unwrap();
    fs::write(dir.join("model.safetensors"), file(tensors)).unwrap();
}

/// A matrix of a checkpoint, as devices get it.
pub(crate) fn data(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    checkpoint.weight(name).unwrap().data.to_vec()
}

/// A directory below the repository's fixtures, if it is there.
pub(crate) fn fixture(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures").join(name);
    if path.exists() {
        return Some(path);
    }
    println!("SKIP: no fixture {}", path.display());
    None
}
