//! `attention.cu`

use super::{Address, Shape, kernel};

/// `SPLIT`, `SPLIT_HEADS` and `SPLIT_THREADS` of `attention.cuh`.
const SPLIT: u32 = 512;
const HEADS: u32 = 8;
const THREADS: u32 = 256;

kernel! {
    /// Reduces the keys of each split of 512 positions to `[max, sum, latents..]`. A split past a row's keys is not written.
    MlaSplits("mla_splits") {
        /// f32 `[T, n, r + dr]`, rounded to bf16 inside
        q: Address,
        /// bf16 `[slots, r + dr]`: one layer of the cache
        cache: Address,
        /// u32 `[T]`: the sequence of each row
        sequences: Address,
        /// u32 `[T]`: the positions that each row sees, its own included
        keys: Address,
        /// u32 `[sequences]`: where in `blocks` a sequence's begin
        first_block: Address,
        /// u32: cache blocks of 64 positions, in order of position within a sequence
        blocks: Address,
        /// f32 `[T, n, splits, r + 2]`
        out: Address,
        /// `n`
        heads: u32,
        /// `r`
        latent: u32,
        /// `dr`
        rope: u32,
        /// Multiplies scores.
        scale: f32,
    } over {
        /// `T`
        rows: u32,
        /// `ceil(most keys / 512)`
        splits: u32,
    }
    => |it| {
        let floats = HEADS * (it.latent + it.rope) + HEADS * SPLIT + SPLIT;
        Shape::new([it.rows, it.heads.div_ceil(HEADS), it.splits], THREADS).with_floats(floats)
    }
}

kernel! {
    /// Merges the splits of each row in ascending order.
    MergeSplits(|it| if it.rounded { "merge_splits_bf16" } else { "merge_splits" }) {
        /// f32 `[T, n, splits, r + 2]`
        parts: Address,
        /// u32 `[T]`: the positions that each row sees
        keys: Address,
        /// f32 `[T, n, r]`; bf16 where rounded
        out: Address,
        /// As [`MlaSplits::splits`].
        splits: u32,
        /// `r`
        latent: u32,
    } over {
        /// Whether what is merged is rounded.
        rounded: bool,
        /// `T`
        rows: u32,
        /// `n`
        heads: u32,
    }
    => |it| Shape::new([it.rows, it.heads, 1], THREADS)
}
