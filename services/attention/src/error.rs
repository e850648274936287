//! Why an attention service cannot start.

use std::io;

use conclave_kernels::KernelError;
use conclave_model::ModelError;

/// What can go wrong at start; what goes wrong for one request is a [`conclave_serve::Error`].
#[derive(Debug, thiserror::Error)]
pub enum AttentionError {
    /// The checkpoint.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device refused a weight.
    #[error("{what}: {cause}")]
    Device { what: String, cause: KernelError },
    /// A setting.
    #[error("{field}: found {found}, expected {expected}")]
    Config { field: &'static str, found: String, expected: String },
    /// The service may be inexact, and its device cannot be.
    #[error("exact: found false, which needs attention over expanded keys and values; device {device} has none")]
    NotExpanding { device: String },
    /// The metrics are registered already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The operating system gave no thread.
    #[error("engine thread: {0}")]
    Thread(io::Error),
}

impl AttentionError {
    pub(crate) fn config(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self::Config { field, found: found.to_string(), expected: expected.into() }
    }

    pub(crate) fn device(what: impl Into<String>) -> impl FnOnce(KernelError) -> Self {
        let what = what.into();
        move |cause| Self::Device { what, cause }
    }
}
