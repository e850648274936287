//! `sm90_mla_expanded.cu`

use super::{Address, LATENT, ROPE, Shape, kernel};
use crate::MlaShape;

/// Rows of queries of a block.
const ROWS: u32 = 128;
const NOPE: usize = 128;
const VALUE: usize = 128;

/// Whether the kernel has these sizes.
pub fn expands(shape: &MlaShape) -> bool {
    (shape.nope, shape.rope, shape.value, shape.latent) == (NOPE, ROPE, VALUE, LATENT)
}

kernel! {
    /// Adds the keys of a chunk to what rows of one sequence have so far, as the plain kernel of this name does: the weights are
    /// rounded to bf16, and it is the rounded ones that are summed.
    MlaExpanded("sm90_mla_expanded") {
        /// Map of bf16 `[n · R, 192]`, tiles of 64 rows: queries head by head, roped
        q: Address,
        /// Map of bf16 `[keys, n · 256]`, tiles of 64 rows: of each head 128 elements of the key, then the value; finite
        /// behind the last key
        kv: Address,
        /// Map of bf16 `[slots, 576]`, tiles of 64 rows: a layer of the cache
        cache: Address,
        /// u32: cache blocks of the chunk
        blocks: Address,
        /// f32 `[R, n, 2 + 128]`
        sums: Address,
        /// Position of the first row.
        position: u32,
        /// Position of the first key, a multiple of 64.
        first: u32,
        /// Keys of the chunk.
        count: u32,
        /// `R`
        rows: u32,
        /// `n`
        heads: u32,
        /// 1: nothing was added so far.
        fresh: u32,
        /// Multiplies scores.
        scale: f32,
    }
    => |it| Shape::new([it.rows.div_ceil(ROWS), it.heads, 1], 384).with_bytes(213_064)
}
