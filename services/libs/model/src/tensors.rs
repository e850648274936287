//! Tensor files: headers, the shard index, and what a configuration expects in them.

mod check;
mod error;
mod expected;
mod header;
mod index;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use expected::Expected;
pub(crate) use expected::expected;
use header::Entry;

pub(crate) use check::{Location, Shard, place};
pub use error::TensorError;
pub(crate) use header::{HEADER_PREFIX, header_bytes, parse as parse_header};
pub(crate) use index::Index;
