//! The trunk: everything of the model but the routed experts.
//!
//! A step runs as segments between two dispatch points: embedding … gate logits of the first MoE layer; then, with the
//! routed experts' output of one layer, up to the gate logits of the next; in the end up to the last layer's residual.
//! Between two segments the shared experts are computed while the rows are with the routed ones.

mod attention;
mod device;
mod weights;

use conclave_kernels::{Dtype, KernelError, Published};

pub use conclave_kernels::{RowSpan, StepRows};
pub(crate) use device::block_bytes;
pub use device::{DeviceTrunk, TrunkSize};
pub use weights::{AttentionWeights, LayerFfn, LayerWeights, QueryWeights, TrunkWeights};

/// Sizes that the engine has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrunkShape {
    /// Logits of a position.
    pub vocab: usize,
    /// Elements of a hidden state `H`.
    pub hidden: usize,
    /// Routed experts of a layer `E`; 0 where every layer is dense.
    pub experts: usize,
    /// Element type of what goes to and comes from the routed experts.
    pub activation: Dtype,
    /// Positions of a cache block.
    pub block: usize,
    /// Blocks of the cache.
    pub blocks: u32,
    /// Longest sequence.
    pub context_limit: usize,
    /// What decides the bits.
    pub numerics: String,
}

/// How a segment ends.
#[derive(Debug)]
pub enum Segment {
    /// At the routed experts of a layer.
    Moe(MoeRows),
    /// At the residual after the last layer: logits can be asked for.
    End,
}

/// What the routed experts of a layer take; `T` rows.
#[derive(Debug)]
pub struct MoeRows {
    /// Absolute index of the layer.
    pub layer: u32,
    /// `[T, H]` in the activation type, little-endian: the normed input.
    pub x: Vec<u8>,
    /// `[T, E]`
    pub logits: Vec<f32>,
    /// `x` is on the board of this process's device too, where it has one.
    pub published: Option<Published>,
}

/// The segments of a model on some hardware. One step at a time; a step that is not finished may be given up.
///
/// An error means that the hardware has failed, for good.
pub trait Trunk: Send + 'static {
    /// Sizes.
    fn shape(&self) -> &TrunkShape;
    /// Starts a step with its rows, at least one.
    ///
    /// # Errors
    /// When the hardware has failed.
    fn begin(&mut self, rows: StepRows) -> Result<Segment, KernelError>;
    /// Computes the shared experts of the layer that the last segment ended at.
    fn shared_experts(&mut self);
    /// Goes on with `routed [T, H]`, the routed experts' output in the activation type, after
    /// [`Trunk::shared_experts`].
    ///
    /// # Errors
    /// When the hardware has failed.
    fn resume(&mut self, routed: &[u8]) -> Result<Segment, KernelError>;
    /// `logits [R, vocab]` of some rows of a step that has ended.
    ///
    /// # Errors
    /// When the hardware has failed.
    fn logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), KernelError>;
}
