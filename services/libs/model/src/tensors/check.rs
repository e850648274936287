//! What a checkpoint has against what its configuration expects.

use std::collections::BTreeMap;

use conclave_kernels::Dtype;

use super::{Entry, Expected, TensorError, expected};
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

/// Where the tensors of the architecture lie, as far as they are there.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    pub(crate) tensors: BTreeMap<String, Location>,
    /// What is missing, mis-shaped, of another type, or left over, with the index of its file.
    pub(crate) problems: Vec<(usize, TensorError)>,
}

impl Placement {
    /// All tensors, or the first problem.
    pub(crate) fn whole(self) -> Result<BTreeMap<String, Location>, (usize, TensorError)> {
        self.problems.into_iter().next().map_or(Ok(self.tensors), Err)
    }
}

/// Finds every tensor of the architecture.
pub(crate) fn place(config: &ModelConfig, shards: &[Shard]) -> Placement {
    let mut found: BTreeMap<&str, (usize, &Entry)> = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        found.extend(shard.entries.iter().map(|entry| (entry.name.as_str(), (index, entry))));
    }
    let mut placement = Placement::default();
    for wanted in expected(config) {
        let Some((shard, entry)) = found.remove(wanted.name.as_str()) else {
            let error = TensorError::Missing { tensor: wanted.name, expected: wanted.shape };
            placement.problems.push((0, error));
            continue;
        };
        match fits(&wanted, entry) {
            Err(error) => placement.problems.push((shard, error)),
            Ok(dtype) => {
                let begin = shards[shard].data_begin + entry.begin;
                let bytes = entry.end - entry.begin;
                let location = Location { shard, dtype, shape: wanted.shape, part: wanted.part, begin, bytes };
                placement.tensors.insert(wanted.name, location);
            }
        }
    }
    let extra = found.into_values().filter(|(_, entry)| !ignored(config, &entry.name));
    placement.problems.extend(extra.map(|(shard, entry)| (shard, left_over(config, entry))));
    placement
}

/// The element type of a tensor that is as the architecture wants it.
fn fits(wanted: &Expected, entry: &Entry) -> Result<Dtype, TensorError> {
    let dtype = servable(entry)?;
    if entry.shape.iter().copied().eq(wanted.shape.iter().map(|dim| *dim as u64)) {
        return Ok(dtype);
    }
    let (tensor, found) = (wanted.name.clone(), entry.shape.clone());
    Err(TensorError::Shape { tensor, found, expected: wanted.shape.clone() })
}

fn servable(entry: &Entry) -> Result<Dtype, TensorError> {
    match entry.dtype {
        "BF16" => Ok(Dtype::Bf16),
        "F32" => Ok(Dtype::F32),
        found => Err(TensorError::UnsupportedDtype { tensor: entry.name.clone(), found }),
    }
}

/// Rotary frequencies follow from the configuration; V3 carries one more layer, for speculation.
pub(crate) fn ignored(config: &ModelConfig, name: &str) -> bool {
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
