//! A checkpoint on disk: checked when it is opened, mapped, read tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use conclave_kernels::{BlockScales, Dtype, Fp8Weights, Weight};
use half::bf16;

use crate::config::GateMethod;
use crate::location::{Located, locate};
use crate::sizes::Part;
use crate::sources::Sources;
use crate::sys::Mapping;
use crate::tensors::{Form, Location, TensorError, place};
use crate::{ModelConfig, ModelError, available_memory, files, fingerprint, memory, names};

/// Documents besides the tensors that the fingerprint covers.
pub(crate) const DOCUMENTS: [&str; 4] =
    ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// A checkpoint, mapped into memory.
///
/// Names, shapes and element types of all tensors have been checked against the configuration. Its files must not be
/// written over while it is open: replace them instead.
#[derive(Debug)]
pub struct Checkpoint {
    located: Located,
    config: ModelConfig,
    tensors: BTreeMap<String, Location>,
    maps: Vec<Mapping>,
    fingerprint: String,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type in the file; of weights in FP8, the one that they are widened to.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Bytes in the file.
    pub bytes: u64,
    /// Whether it holds the scales of a weight in FP8, which is loaded with them.
    pub is_scales: bool,
    /// Whether it is in FP8.
    pub is_fp8: bool,
    /// Part of the model.
    pub part: Part,
    /// Where it begins: number of the file, first byte.
    pub place: (usize, u64),
}

impl Checkpoint {
    /// Opens the checkpoint in a directory, or `org/name` in the local Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`).
    ///
    /// # Errors
    /// Names the file, field or tensor, what was found and what was expected.
    pub fn open(location: &str) -> Result<Self, ModelError> {
        let located = locate(location)?;
        let config = ModelConfig::read(&located.dir)?;
        let sources = Sources::open(&located.dir)?;
        let tensors = place(&config, &sources.shards).whole().map_err(|(shard, error)| sources.error(shard, error))?;
        Self::assemble(located, config, &sources, tensors)
    }

    /// Fingerprints and maps files whose tensors have been found.
    pub(crate) fn assemble(
        located: Located,
        config: ModelConfig,
        sources: &Sources,
        tensors: BTreeMap<String, Location>,
    ) -> Result<Self, ModelError> {
        let documents = documents(&located.dir)?;
        let fingerprint = fingerprint::fingerprint(&documents, &tensors, &sources.files)
            .map_err(|(shard, cause)| sources.io_error(shard, "read a sample", cause))?;
        let maps = sources.map()?;
        let checkpoint = Self { located, config, tensors, maps, fingerprint };
        checkpoint.check_gate_biases(sources)?;
        Ok(checkpoint)
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The directory of the files.
    pub fn dir(&self) -> &Path {
        &self.located.dir
    }

    /// The name it is served under where none is given: the directory's, or `org/name`.
    pub fn name(&self) -> &str {
        &self.located.name
    }

    /// What tells this checkpoint from others: hexadecimal, over configuration, tokenizer, and every tensor's name,
    /// shape, element type and a sample of its bytes.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A tensor of one or two dimensions as a matrix (one: `[n, 1]`): as it lies in the file, at any alignment, with its scales if
    /// it is in FP8.
    ///
    /// # Errors
    /// When there is no such tensor or it has other dimensions.
    pub fn weight(&self, name: &str) -> Result<Weight<'_>, ModelError> {
        let location = self.location(name)?;
        let (rows, cols) = match location.shape.as_slice() {
            &[rows, cols] => (rows, cols),
            &[rows] => (rows, 1),
            found => return Err(rank(name, found, "one or two dimensions")),
        };
        let scales = match location.form {
            Form::Plain | Form::Scales => None,
            Form::Quantised(block) => {
                let scales = self.bytes(self.location(&names::scales(name))?);
                Some(BlockScales::new(scales, (block.rows, block.cols)))
            }
        };
        Ok(Weight { dtype: location.dtype, data: self.bytes(location), rows, cols, transposed: false, scales })
    }

    /// A tensor of one dimension, as f32.
    ///
    /// # Errors
    /// When there is no such tensor or it has other dimensions.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let location = self.location(name)?;
        if location.shape.len() != 1 {
            return Err(rank(name, &location.shape, "one dimension"));
        }
        Ok(floats(location.dtype, self.bytes(location)))
    }

    /// Bytes of a tensor in its file, with those of its scales.
    pub fn bytes_of(&self, name: &str) -> Option<u64> {
        self.tensors.contains_key(name).then(|| self.with_scales(name).map(|at| at.bytes).sum())
    }

    /// Bytes that a tensor takes on a device that computes in bf16 and does this with matrices in FP8. Scales of those that are
    /// widened take none. What expands keys and values is split into a matrix a head, and these are widened everywhere.
    pub fn loaded_bytes_of(&self, name: &str, fp8: Fp8Weights) -> Option<u64> {
        self.tensors.get(name).map(|at| loaded_bytes(name, at, fp8))
    }

    /// Has a tensor read from storage, without waiting for it.
    pub(crate) fn will_need(&self, name: &str) {
        for at in self.with_scales(name) {
            if let Err(error) = self.maps[at.shard].will_need(at.begin, at.bytes) {
                tracing::debug!(tensor = name, %error, "not read ahead");
            }
        }
    }

    /// Gives back the memory of a tensor's mapped pages, once a device has taken it over. A later read finds the same.
    pub fn release(&self, name: &str) {
        for at in self.with_scales(name) {
            if let Err(error) = self.maps[at.shard].release(at.begin, at.bytes) {
                tracing::warn!(tensor = name, %error, "mapped pages are not released");
            }
        }
    }

    /// A tensor, and that of its scales if it is quantised.
    fn with_scales(&self, name: &str) -> impl Iterator<Item = &Location> {
        let scales = self.tensors.get(name).filter(|at| matches!(at.form, Form::Quantised(_)));
        self.tensors.get(name).into_iter().chain(scales.and_then(|_| self.tensors.get(&names::scales(name))))
    }

    /// Every tensor, in order of name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|(name, at)| TensorInfo {
            name,
            dtype: at.dtype,
            shape: &at.shape,
            bytes: at.bytes,
            is_scales: at.form == Form::Scales,
            is_fp8: matches!(at.form, Form::Quantised(_)),
            part: at.part,
            place: (at.shard, at.begin),
        })
    }

    /// Bytes that all tensors take on a device that does this with matrices in FP8.
    pub fn loaded_bytes(&self, fp8: Fp8Weights) -> u64 {
        self.tensors.iter().map(|(name, at)| loaded_bytes(name, at, fp8)).sum()
    }

    /// Bytes of all tensors in their files.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|at| at.bytes).sum()
    }

    /// Refuses to load `needed` bytes where the machine or the process's control group has less.
    ///
    /// # Errors
    /// [`ModelError::WeightsDoNotFit`] with both numbers.
    pub fn check_memory(&self, needed: u64) -> Result<(), ModelError> {
        match available_memory() {
            Some(left) if left.bytes < needed => {
                Err(ModelError::WeightsDoNotFit { needed, available: left.bytes, limited_by: left.limited_by })
            }
            _ => Ok(()),
        }
    }

    /// Bytes of one cell on a device that does this with matrices in FP8: one group's experts of all layers. 0 where every layer
    /// is dense.
    pub fn cell_bytes(&self, fp8: Fp8Weights) -> u64 {
        let routed = self.tensors.values().filter(|at| at.part == Part::Routed);
        routed.map(|at| at.loaded_bytes(fp8)).sum::<u64>() / self.config.cell_groups().max(1) as u64
    }

    /// The bias of each gate's choice `[E]`, by absolute layer; empty where there is none.
    ///
    /// # Errors
    /// When a tensor has other dimensions.
    pub fn gate_biases(&self) -> Result<Vec<Vec<f32>>, ModelError> {
        let biased = |layer| self.config.gate_method == GateMethod::NoauxTc && self.config.is_moe(layer);
        let of = |layer| if biased(layer) { self.vector(&names::layer(layer).gate_bias()) } else { Ok(Vec::new()) };
        (0..self.config.layers).map(of).collect()
    }

    /// How many cells fit into the memory that is left; `usize::MAX` where nothing says how much that is.
    pub fn cells_that_fit(&self, fp8: Fp8Weights) -> usize {
        let fits = |left: memory::AvailableMemory| left.bytes / self.cell_bytes(fp8).max(1);
        available_memory().map_or(usize::MAX, |left| usize::try_from(fits(left)).unwrap_or(usize::MAX))
    }

    fn location(&self, name: &str) -> Result<&Location, ModelError> {
        self.tensors.get(name).ok_or_else(|| ModelError::NoSuchTensor { name: name.into() })
    }

    fn bytes(&self, location: &Location) -> &[u8] {
        self.maps[location.shard].bytes(location.begin, location.bytes)
    }

    fn check_gate_biases(&self, sources: &Sources) -> Result<(), ModelError> {
        if self.config.gate_method != GateMethod::NoauxTc {
            return Ok(());
        }
        for layer in self.config.moe_layers() {
            let name = names::layer(layer).gate_bias();
            let bias = self.vector(&name)?;
            if let Some(position) = bias.iter().position(|value| !value.is_finite()) {
                let shard = self.location(&name)?.shard;
                let error = TensorError::NonFinite { tensor: name, found: bias[position], position };
                return Err(sources.error(shard, error));
            }
        }
        Ok(())
    }
}

fn loaded_bytes(name: &str, at: &Location, fp8: Fp8Weights) -> u64 {
    at.loaded_bytes(if names::is_of_heads(name) { Fp8Weights::Widened } else { fp8 })
}

fn rank(name: &str, found: &[usize], expected: &'static str) -> ModelError {
    ModelError::Rank { name: name.into(), found: found.to_vec(), expected }
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::Bf16 => bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
    }
}

fn documents(dir: &Path) -> Result<Vec<fingerprint::Document>, ModelError> {
    DOCUMENTS.into_iter().map(|name| Ok((name, files::read_optional(&dir.join(name))?))).collect()
}

#[cfg(test)]
mod tests;
