//! Tensor files: headers, the shard index, and what a configuration expects in them.

mod check;
mod error;
mod expected;
mod header;
mod index;
#[cfg(test)]
mod tests;

pub(crate) use expected::{Expected, expected};
use header::Entry;

pub(crate) use check::{FP8, Form, Location, Placement, Shard, ignored, may_be_fp8, place, scales};
pub use error::TensorError;
pub(crate) use header::{HEADER_PREFIX, header_bytes, parse as parse_header};
pub(crate) use index::Index;
