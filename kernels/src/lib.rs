//! The operations of the model. Each has a plain Rust definition (`ops`, f32 throughout) which is its specification,
//! and fast implementations per device.

pub mod activation;
mod arena;
mod cache;
pub mod cell_tree;
mod cpu;
pub mod cuda;
mod device;
mod dtype;
mod grid;
mod host;
pub mod link;
mod ops;
mod panels;
mod pool;
mod rates;
mod reference;
mod rotary;
mod scratch;
mod shared;
mod step;
mod tasks;
mod tokens;
mod weight;

pub use cpu::{Cpu, CpuRates, Isa};
pub use device::{Device, ExpertRows, Ffn, Fp8Weights, LatentWrite, Mla, MlaShape};
pub use dtype::Dtype;
pub use pool::Pool;
pub use rates::RateProbe;
pub use reference::Reference;
pub use rotary::RotaryTable;
pub use shared::{GroupedSums, NotShared, Published, RowsAt, SumsAt, Wanted};
pub use step::{RowSpan, StepRows};
pub use tokens::{Drawing, FoundToken, LogitChange, TokenAsk, TokenSource};
pub use weight::{BlockScales, Weight};

/// What can go wrong when a device is made, a weight is loaded or results are read.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A weight whose bytes do not match its shape.
    #[error("weight of {rows} x {cols} {format}: expected {expected} bytes, found {found}")]
    WeightSize { rows: usize, cols: usize, format: &'static str, expected: usize, found: usize },
    /// Scales whose bytes do not match the shape of their weight.
    #[error("scales of {rows} x {cols} e4m3 in blocks of {} x {}: expected {expected} bytes, found {found}", block.0, block.1)]
    ScalesSize { rows: usize, cols: usize, block: (usize, usize), expected: usize, found: usize },
    /// Blocks of no rows or no columns.
    #[error("scales of {rows} x {cols} e4m3 in blocks of {} x {}: expected blocks of at least 1 x 1", block.0, block.1)]
    NoBlocks { rows: usize, cols: usize, block: (usize, usize) },
    /// A name that no instruction set has.
    #[error("instruction set: found {asked}, expected one of {known}")]
    UnknownIsa { asked: String, known: String },
    /// An instruction set that was asked for and is not there.
    #[error("instruction set {asked}: not available on this machine (found: {found})")]
    MissingIsa { asked: String, found: String },
    /// A message that does not say which element type its payload has.
    #[error("element type of a payload: unspecified (expected f32 or bf16)")]
    NoActivation,
    /// A GPU.
    #[error(transparent)]
    Cuda(#[from] cuda::CudaError),
    /// A device that can compute no more. Every later result is refused with the same message.
    #[error("the device has failed: {0}")]
    Failed(String),
    /// Memory that only some devices share.
    #[error("device {device}: shares no memory with other processes (expected one of kind cuda)")]
    NotShared { device: String },
    /// Links that only some devices have.
    #[error("device {device}: has no links to devices of other processes (expected one of kind cuda)")]
    NotLinked { device: String },
    /// A link that was broken off, or met an error before.
    #[error("the link has ended: {0}")]
    LinkEnded(String),
    /// The operating system gave no memory or thread.
    #[error("{what}: {source}")]
    Os { what: &'static str, source: std::io::Error },
}
