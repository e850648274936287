//! Launches of the plain kernels: those of `cuda/*.cu`, for any sizes. One struct a kernel, under its name; the fields are
//! its arguments in order. Where nothing is to be done, nothing is launched.

mod attention;
mod choices;
mod elementwise;
mod expanded;
mod gate_logits;
mod grouped_linear;
mod heads;
mod linear;
mod quantize;
mod rows;
mod sample;

pub use attention::{MergeSplits, MlaSplits};
pub use choices::*;
pub use elementwise::{Add, AddTwo, DecodeBf16, RoundBf16, Swiglu};
pub use expanded::{FinishExpanded, GatherLatents, MlaExpanded, RopeQueries};
pub use gate_logits::GateLogits;
pub use grouped_linear::{GroupedLinear, GroupedLinearFp8};
pub use heads::{MlaQueries, MlaValues, SplitQueries};
pub use linear::{Linear, LinearFp8};
pub use quantize::Quantize;
pub use rows::{AddSlots, CombinePairs, EmbedBf16, EmbedF32, GatherBf16, RmsNorm, WriteLatents};
pub use sample::{
    AdjustLogits, Adjustment, Draw, Likely, MOST_LIKELY, MOST_LOGITS, Penalties, RestoreLogits, RowScore, Sample,
    Score, Scored,
};

pub use super::kernel::Address;
use super::kernel::{Shape, kernel};
