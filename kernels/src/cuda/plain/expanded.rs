//! `expanded.cu`: a block a row, or a row and head.

use super::{Address, Shape, kernel};
use crate::Dtype;

/// `ROW_THREADS` of `rows.cuh`, and `EXPANDED_THREADS`.
const ROW_THREADS: u32 = 256;
const THREADS: u32 = 128;
/// Scores or weights of keys in shared memory: `KEYS_AT_ONCE`.
const SCORES: u32 = 256;

kernel! {
    /// Latents of some positions of a sequence, row by row; zeros behind them.
    GatherLatents("gather_latents") {
        /// bf16 `[slots, width]`: a layer of the cache
        cache: Address,
        /// u32: cache blocks of 64 positions of the sequence
        blocks: Address,
        /// bf16 `[rows, r]`
        out: Address,
        /// The first position.
        first: u32,
        /// Positions, at most `rows`.
        count: u32,
        /// `r`
        latent: u32,
        /// `r + dr`
        width: u32,
    } over {
        /// Rows that are written.
        rows: u32,
    }
    => |it| Shape::new([it.rows, 1, 1], ROW_THREADS)
}

kernel! {
    /// Queries, their last part roped, rounded, head by head.
    RopeQueries("rope_queries") {
        /// f32 `[R, n, dn + dr]`
        q: Address,
        /// f32 `[positions, dr / 2]`
        cos: Address,
        /// f32 `[positions, dr / 2]`
        sin: Address,
        /// u32 `[R]`
        positions: Address,
        /// bf16 `[n, R, dn + dr]`
        out: Address,
        /// `dn`
        nope: u32,
        /// `dr`
        rope: u32,
    } over {
        /// `R`
        rows: u32,
        /// `n`
        heads: u32,
    }
    => |it| Shape::new([it.rows, it.heads, 1], ROW_THREADS)
}

kernel! {
    /// Adds the keys of a chunk to what rows of one sequence have so far: `[max, sum, values..]` of each row and head.
    MlaExpanded("mla_expanded") {
        /// bf16 `[n, R, dn + dr]`, as [`RopeQueries`] leaves them
        q: Address,
        /// f32 `[count, n, dn + dv]`: keys without their roped part, and values; rounded by the kernel
        kv: Address,
        /// bf16 `[slots, r + dr]`: a layer of the cache, of which the roped keys are read
        cache: Address,
        /// u32: cache blocks of the sequence
        blocks: Address,
        /// f32 `[R, n, 2 + dv]`
        sums: Address,
        /// Position of the first row.
        position: u32,
        /// Position of the first key.
        first: u32,
        /// Keys of the chunk.
        count: u32,
        /// 1: nothing was added so far.
        fresh: u32,
        /// `dn`
        nope: u32,
        /// `dr`
        rope: u32,
        /// `dv`
        value: u32,
        /// `r`
        latent: u32,
        /// Multiplies scores.
        scale: f32,
    } over {
        /// `R`
        rows: u32,
        /// `n`
        heads: u32,
    }
    => |it| Shape::new([it.rows, it.heads, 1], THREADS).with_floats(it.nope + it.rope + it.value + SCORES)
}

kernel! {
    /// `out = values / sum`
    FinishExpanded(|it| match it.dtype {
        Dtype::F32 => "finish_expanded",
        Dtype::Bf16 => "finish_expanded_bf16",
    }) {
        /// f32 `[R, n, 2 + dv]`
        sums: Address,
        /// `[R, n, dv]`
        out: Address,
        /// `dv`
        value: u32,
    } over {
        /// Of `out`.
        dtype: Dtype,
        /// `R`
        rows: u32,
        /// `n`
        heads: u32,
    }
    => |it| Shape::new([it.rows, it.heads, 1], ROW_THREADS)
}
