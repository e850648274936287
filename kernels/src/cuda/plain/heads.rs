//! `heads.cu`: products with a matrix for each head.

use super::{Address, Shape, kernel, linear::tiles};

/// `ROW_THREADS` of `rows.cuh`.
const THREADS: u32 = 256;

kernel! {
    /// Absorbed queries: `uk · round(q_nope)`, then the roped rest of `q`.
    MlaQueries("mla_queries") {
        /// f32 `[T, n, dn + dr]`
        q: Address,
        /// bf16 `[n, r, dn]`
        uk: Address,
        /// f32 `[positions, dr / 2]`
        cos: Address,
        /// f32 `[positions, dr / 2]`
        sin: Address,
        /// u32 `[T]`
        positions: Address,
        /// f32 `[T, n, r + dr]`
        out: Address,
        /// `T`, at most 2^20
        rows: u32,
        /// `dn`
        nope: u32,
        /// `dr`
        rope: u32,
        /// `r`
        latent: u32,
    } over {
        /// `n`
        heads: u32,
    }
    => |it| tiles(it.rows, it.latent, it.heads)
}

kernel! {
    /// Values: `uv · round(o_lat)` a head.
    MlaValues("mla_values") {
        /// f32 `[T, n, r]`
        o_lat: Address,
        /// bf16 `[n, dv, r]`
        uv: Address,
        /// f32 `[T, n, dv]`
        out: Address,
        /// `T`, at most 2^20
        rows: u32,
        /// `r`
        latent: u32,
        /// `dv`
        value: u32,
    } over {
        /// `n`
        heads: u32,
    }
    => |it| tiles(it.rows, it.value, it.heads)
}

kernel! {
    /// Queries on their way to another product of the heads: what has no position, and the roped rest, both rounded.
    SplitQueries("split_queries") {
        /// f32 `[T, n, dn + dr]`
        q: Address,
        /// f32 `[positions, dr / 2]`
        cos: Address,
        /// f32 `[positions, dr / 2]`
        sin: Address,
        /// u32 `[T]`
        positions: Address,
        /// bf16 `[T, n, dn]`
        nope_out: Address,
        /// bf16 `[T, n, r + dr]`, of which the last `dr` are written
        absorbed: Address,
        /// `dn`
        nope: u32,
        /// `dr`
        rope: u32,
        /// `r`
        latent: u32,
    } over {
        /// `T`
        rows: u32,
        /// `n`
        heads: u32,
    }
    => |it| Shape::new([it.rows, it.heads, 1], THREADS)
}
