//! The trunk: everything of the model but the routed experts.
//!
//! A step runs as segments between two dispatch points: embedding … gate logits of the first MoE layer; then, with the
//! routed experts' output of one layer, up to the gate logits of the next; in the end up to the last layer's residual.
//! Between two segments the shared experts are computed while the rows are with the routed ones.

mod attention;
mod device;
mod lane;
mod weights;

use conclave_kernels::{Dtype, FoundToken, KernelError, Pool, Published, TokenAsk};

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

/// Micro-batches of a step that may be under way together: while the rows of one are with the routed experts, another has
/// its segment.
pub const LANES: usize = 2;

/// The segments of a model on some hardware. One step at a time, in one or more lanes; a step that is not finished may be given
/// up. Rows of a lane may attend to those of the lanes before it, whose segment of the same layer must have been started
/// before.
///
/// An error means that the hardware has failed, for good.
pub trait Trunk: Send + 'static {
    /// Sizes.
    fn shape(&self) -> &TrunkShape;
    /// Whether what [`Trunk::begin`] and [`Trunk::resume`] start goes on by itself. If not, it is done when they return.
    fn queues(&self) -> bool {
        false
    }
    /// Starts a step (lane 0), or adds rows to the one that was started (the lane behind): the first segment of some rows, at
    /// least one.
    fn begin(&mut self, lane: usize, rows: StepRows);
    /// Waits for the segment that was started last in a lane.
    ///
    /// # Errors
    /// When the hardware has failed.
    fn finish(&mut self, lane: usize) -> Result<Segment, KernelError>;
    /// Computes the shared experts of the layer that the lane's segment ended at, if that has not begun by itself.
    fn shared_experts(&mut self, lane: usize);
    /// Starts the next segment with `routed [T, H]`, the routed experts' output in the activation type, after
    /// [`Trunk::shared_experts`].
    fn resume(&mut self, lane: usize, routed: &[u8]);
    /// `logits [R, vocab]` of some rows of a step that has ended, ascending; rows of a lane lie behind those of the lanes
    /// before it.
    ///
    /// # Errors
    /// When the hardware has failed.
    fn logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), KernelError>;

    /// Threads that have nothing to do between two steps.
    fn pool(&self) -> Option<&Pool> {
        None
    }
    /// Whether there is [`Trunk::find_tokens`]; without it, logits are to be read.
    fn finds_tokens(&self) -> bool {
        false
    }
    /// What is asked of the logits of some rows of a step that has ended; see [`conclave_kernels::Device::find_tokens`].
    ///
    /// # Errors
    /// When the hardware has failed.
    fn find_tokens(
        &mut self,
        rows: &[u32],
        mask: &[u64],
        asks: &[TokenAsk<'_>],
    ) -> Result<Vec<Option<FoundToken>>, KernelError> {
        let _ = (rows, mask);
        Ok(vec![None; asks.len()])
    }
}
