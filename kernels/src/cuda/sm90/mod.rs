//! Launches of the kernels for sm_90a: those of `cuda/sm90/*.cu`, with the tensor maps that they read and the work lists of
//! attention. One struct a kernel; the fields are its arguments in order.

mod attention;
mod expanded;
mod fp8;
mod grouped;
pub mod maps;

pub use attention::{LATENT, MlaItem, MlaSplits, QUERIES, ROPE, items, rows_together};
pub use expanded::{MlaExpanded, expands};
pub use fp8::{FP8_BLOCK, GroupedProductFp8, Quantize, fits_fp8};
pub use grouped::{GROUPS, GroupedHeads, GroupedProduct, Tokens};

use super::kernel::{Address, Shape, kernel};

/// What [`Driver::chip`](super::Driver::chip) says of chips that these kernels run on.
pub const CHIP: &str = "sm_90a";

/// Whether the copy engine takes rows of `inner` elements of bf16: whole 16 bytes.
pub fn fits(inner: usize) -> bool {
    inner > 0 && inner.is_multiple_of(8)
}
