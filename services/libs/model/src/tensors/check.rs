//! What a checkpoint has against what its configuration expects.

use std::collections::BTreeMap;

use conclave_kernels::{Dtype, Fp8Weights};

use super::{Entry, Expected, TensorError, expected};
use crate::config::BlockQuantization;
use crate::sizes::Part;
use crate::{ModelConfig, ModelKind, names};

/// Where a tensor of the architecture lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    /// Index of the file.
    pub(crate) shard: usize,
    /// What devices get.
    pub(crate) dtype: Dtype,
    pub(crate) form: Form,
    pub(crate) shape: Vec<usize>,
    pub(crate) part: Part,
    /// First byte, from the start of the file.
    pub(crate) begin: u64,
    pub(crate) bytes: u64,
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As its element type says.
    Plain,
    /// In E4M3; its scales are a tensor of their own.
    Quantised(BlockQuantization),
    /// Scales of a quantised weight.
    Scales,
}

impl Location {
    /// Bytes that it takes on a device that computes in bf16 and does this with matrices in FP8.
    pub(crate) fn loaded_bytes(&self, fp8: Fp8Weights) -> u64 {
        match (self.form, fp8) {
            (Form::Plain, _) | (_, Fp8Weights::Kept | Fp8Weights::Multiplied) => self.bytes,
            (Form::Quantised(_), Fp8Weights::Widened) => self.bytes * Dtype::Bf16.size() as u64,
            (Form::Scales, Fp8Weights::Widened) => 0,
        }
    }
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
        let form = form(config, &wanted, entry);
        let scales = match form {
            Form::Quantised(block) => Some(scales(&wanted, block)),
            Form::Plain | Form::Scales => None,
        };
        placement.put(shards, (shard, entry), wanted, form);
        let Some(scales) = scales else { continue };
        match found.remove(scales.name.as_str()) {
            Some(at) => placement.put(shards, at, scales, Form::Scales),
            None => {
                let error = TensorError::Missing { tensor: scales.name, expected: scales.shape };
                placement.problems.push((shard, error));
            }
        }
    }
    let extra = found.into_values().filter(|(_, entry)| !ignored(config, &entry.name));
    placement.problems.extend(extra.map(|(shard, entry)| (shard, left_over(config, entry))));
    placement
}

impl Placement {
    /// Takes a tensor that was found in a file, if it is as the architecture wants it.
    fn put(&mut self, shards: &[Shard], (shard, entry): (usize, &Entry), wanted: Expected, form: Form) {
        match fits(&wanted, entry, form) {
            Err(error) => self.problems.push((shard, error)),
            Ok(dtype) => {
                let (begin, bytes) = (shards[shard].data_begin + entry.begin, entry.end - entry.begin);
                let location = Location { shard, dtype, form, shape: wanted.shape, part: wanted.part, begin, bytes };
                self.tensors.insert(wanted.name, location);
            }
        }
    }
}

fn form(config: &ModelConfig, wanted: &Expected, entry: &Entry) -> Form {
    match config.quantization {
        Some(block) if entry.dtype == FP8 && may_be_fp8(wanted) => Form::Quantised(block),
        _ => Form::Plain,
    }
}

/// As the format spells the element type.
pub(crate) const FP8: &str = "F8_E4M3";

/// Projections may be in FP8 where the configuration says so: not norms, embeddings, gates and the output.
pub(crate) fn may_be_fp8(tensor: &Expected) -> bool {
    matches!(tensor.part, Part::Attention | Part::Dense | Part::Shared | Part::Routed) && tensor.shape.len() == 2
}

/// The scales of a matrix in FP8.
pub(crate) fn scales(of: &Expected, block: BlockQuantization) -> Expected {
    let shape = vec![of.shape[0].div_ceil(block.rows), of.shape[1].div_ceil(block.cols)];
    Expected { name: names::scales(&of.name), shape, part: of.part }
}

/// The element type that devices get, of a tensor that is as the architecture wants it.
fn fits(wanted: &Expected, entry: &Entry, form: Form) -> Result<Dtype, TensorError> {
    let dtype = match form {
        Form::Quantised(_) => Dtype::F32,
        Form::Plain => servable(entry)?,
        Form::Scales if entry.dtype == "F32" => Dtype::F32,
        Form::Scales => return Err(TensorError::ScaleDtype { tensor: entry.name.clone(), found: entry.dtype }),
    };
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
