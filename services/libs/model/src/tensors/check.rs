//! What a checkpoint has against what its configuration expects.

use std::collections::BTreeMap;

use conclave_kernels::Dtype;

use super::{Entry, TensorError, expected};
use crate::sizes::Part;
use crate::{ModelConfig, ModelKind, names};

/// Where a tensor of the architecture lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    /// Index of the file.
    pub(crate) shard: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) part: Part,
    /// First byte, from the start of the file.
    pub(crate) begin: u64,
    pub(crate) bytes: u64,
}

/// A file's entries and the byte at which its data begins.
pub(crate) struct Shard {
    pub(crate) entries: Vec<Entry>,
    pub(crate) data_begin: u64,
}

/// Finds every tensor of the architecture; refuses what is missing, mis-shaped, of another type, or left over.
pub(crate) fn place(
    config: &ModelConfig,
    shards: &[Shard],
) -> Result<BTreeMap<String, Location>, (usize, TensorError)> {
    let mut found: BTreeMap<&str, (usize, &Entry)> = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        found.extend(shard.entries.iter().map(|entry| (entry.name.as_str(), (index, entry))));
    }
    let mut placed = BTreeMap::new();
    for wanted in expected(config) {
        let Some((shard, entry)) = found.remove(wanted.name.as_str()) else {
            return Err((0, TensorError::Missing { tensor: wanted.name, expected: wanted.shape }));
        };
        let dtype = servable(entry).map_err(|error| (shard, error))?;
        if !entry.shape.iter().copied().eq(wanted.shape.iter().map(|dim| *dim as u64)) {
            let (tensor, found) = (wanted.name, entry.shape.clone());
            return Err((shard, TensorError::Shape { tensor, found, expected: wanted.shape }));
        }
        let begin = shards[shard].data_begin + entry.begin;
        let bytes = entry.end - entry.begin;
        let location = Location { shard, dtype, shape: wanted.shape, part: wanted.part, begin, bytes };
        placed.insert(wanted.name, location);
    }
    match found.into_values().find(|(_, entry)| !ignored(config, &entry.name)) {
        Some((shard, entry)) => Err((shard, left_over(config, entry))),
        None => Ok(placed),
    }
}

fn servable(entry: &Entry) -> Result<Dtype, TensorError> {
    match entry.dtype {
        "BF16" => Ok(Dtype::Bf16),
        "F32" => Ok(Dtype::F32),
        found => Err(TensorError::UnsupportedDtype { tensor: entry.name.clone(), found }),
    }
}

/// Rotary frequencies follow from the configuration; V3 carries one more layer, for speculation.
fn ignored(config: &ModelConfig, name: &str) -> bool {
    let speculation = config.kind == ModelKind::DeepseekV3 && name.starts_with(names::layer(config.layers).prefix());
    name.ends_with("rotary_emb.inv_freq") || speculation
}

fn left_over(config: &ModelConfig, entry: &Entry) -> TensorError {
    let tensor = entry.name.clone();
    if config.shared_experts.is_none() && tensor.contains(".mlp.shared_experts.") {
        return TensorError::SharedExperts { tensor };
    }
    TensorError::Extra { tensor, found: entry.shape.clone() }
}
