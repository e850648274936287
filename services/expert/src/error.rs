//! What can go wrong with the cells of an expert process.

use conclave_kernels::KernelError;
use conclave_model::ModelError;
use conclave_proto::CellId;

/// Why cells cannot be loaded, unloaded or trusted.
#[derive(Debug, thiserror::Error)]
pub enum ExpertError {
    /// The checkpoint has no routed experts.
    #[error("checkpoint {0}: no layer has routed experts, expected at least one")]
    Dense(String),
    /// A cell that the model does not have.
    #[error("cell {cell}: not in this model (expected groups 0 to {last}, span 0)")]
    NoSuchCell { cell: CellId, last: usize },
    /// A tensor is missing or cannot be used.
    #[error("cell {cell}: {source}")]
    Tensor { cell: CellId, source: ModelError },
    /// The device did not take a tensor.
    #[error("cell {cell}: {tensor}: {source}")]
    Device { cell: CellId, tensor: String, source: KernelError },
    /// The weights do not fit.
    #[error(transparent)]
    Memory(#[from] ModelError),
    /// The compute thread or the checking device could not be made.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The operating system gave no thread.
    #[error("compute thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The device's result is not a number.
    #[error("self-check of cell {cell}, layer {layer}: result is not finite")]
    NotFinite { cell: CellId, layer: usize },
    /// The device disagrees with the definition.
    #[error(
        "self-check of cell {cell}, layer {layer}, expert {expert}: differs from the definition by {found:e} of the \
         largest value, expected at most {expected:e}"
    )]
    Disagrees { cell: CellId, layer: usize, expert: usize, found: f32, expected: f32 },
    /// A member that is on its way out loads nothing.
    #[error("this shard is leaving")]
    Leaving,
}
