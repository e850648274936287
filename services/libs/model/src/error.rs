//! What can go wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::ConfigError;
use crate::json::JsonError;
use crate::synth::SynthError;
use crate::tensors::TensorError;
use crate::text::TextError;

/// What can go wrong when a checkpoint is found, opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Neither a directory nor in the local Hugging Face cache.
    #[error("model {location:?}: not found; expected a directory, or org/name in the local cache (looked at {looked})")]
    NotFound { location: String, looked: String },
    /// The operating system refused.
    #[error("{}: {action}: {cause}", path.display())]
    Io { path: PathBuf, action: &'static str, cause: io::Error },
    /// A document larger than any real one.
    #[error("{}: found {found} bytes, expected at most {limit}", path.display())]
    FileTooLarge { path: PathBuf, found: u64, limit: u64 },
    /// `config.json` cannot be used.
    #[error("{}: {error}", path.display())]
    Config { path: PathBuf, error: ConfigError },
    /// Another JSON document is malformed.
    #[error("{}: {error}", path.display())]
    Json { path: PathBuf, error: JsonError },
    /// A tensor file or the index cannot be used.
    #[error("{}: {error}", path.display())]
    Tensor { path: PathBuf, error: TensorError },
    /// The tokenizer or chat template cannot be used.
    #[error("{}: {error}", path.display())]
    Text { path: PathBuf, error: TextError },
    /// A tensor asked for that the checkpoint does not have.
    #[error("tensor {name}: not in the checkpoint")]
    NoSuchTensor { name: String },
    /// A tensor used as something it is not.
    #[error("tensor {name}: found shape {found:?}, expected {expected}")]
    Rank { name: String, found: Vec<usize>, expected: &'static str },
    /// A random-weight checkpoint is not written.
    #[error(transparent)]
    Synth(#[from] SynthError),
    /// The machine has too little memory.
    #[error("weights do not fit: {needed} bytes needed, {available} available ({limited_by})")]
    WeightsDoNotFit { needed: u64, available: u64, limited_by: String },
}

impl ModelError {
    /// Puts a path and what was being done to an I/O error.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |cause| Self::Io { path, action, cause }
    }

    /// Puts a path to an error of a tensor file.
    pub(crate) fn tensor(path: &Path) -> impl FnOnce(TensorError) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Tensor { path, error }
    }

    /// Puts a path to an error of a JSON document.
    pub(crate) fn json(path: &Path) -> impl FnOnce(JsonError) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Json { path, error }
    }
}
