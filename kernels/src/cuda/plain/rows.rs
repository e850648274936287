//! `rows.cu` and `latents.cu`: a block a row.

use super::{Address, Shape, kernel};

/// `ROW_THREADS` of `rows.cuh`.
const THREADS: u32 = 256;

fn shape(rows: u32) -> Shape {
    Shape::new([rows, 1, 1], THREADS)
}

kernel! {
    /// `out = table[tokens]` of a table in bf16.
    EmbedBf16("embed_bf16") {
        /// bf16 `[V, H]`
        table: Address,
        /// u32 `[T]`, below `V`
        tokens: Address,
        /// f32 `[T, H]`
        out: Address,
        /// `H`
        hidden: u32,
    } over {
        /// `T`
        rows: u32,
    }
    => |it| shape(it.rows)
}

kernel! {
    /// `out = table[tokens]` of a table in f32.
    EmbedF32("embed_f32") {
        /// f32 `[V, H]`
        table: Address,
        /// u32 `[T]`, below `V`
        tokens: Address,
        /// f32 `[T, H]`
        out: Address,
        /// `H`
        hidden: u32,
    } over {
        /// `T`
        rows: u32,
    }
    => |it| shape(it.rows)
}

kernel! {
    /// `out = gain ⊙ x / sqrt(mean(x²) + eps)`, and rounded; `x` and `out` may be the same.
    RmsNorm("rms_norm") {
        /// f32 `[T, H]`
        x: Address,
        /// f32 `[H]`
        gain: Address,
        /// f32 `[T, H]`
        out: Address,
        /// bf16 `[T, H]`
        rounded: Address,
        /// `H`
        hidden: u32,
        /// Added to the mean of squares.
        eps: f32,
    } over {
        /// `T`
        rows: u32,
    }
    => |it| shape(it.rows)
}

kernel! {
    /// `out = x[rows]`
    GatherBf16("gather_bf16") {
        /// bf16 `[R, H]`
        x: Address,
        /// u32 `[P]`, below `R`
        rows: Address,
        /// bf16 `[P, H]`
        out: Address,
        /// `H`
        hidden: u32,
    } over {
        /// `P`
        pairs: u32,
    }
    => |it| shape(it.pairs)
}

kernel! {
    /// `slots[into] = round( slots[into] + slots[from] )`
    AddSlots("add_slots") {
        /// bf16 `[S, H]`
        slots: Address,
        /// u32 `[N]`, below `S`; no slot twice, nor in `from`
        into: Address,
        /// u32 `[N]`, below `S`
        from: Address,
        /// `H`
        hidden: u32,
    } over {
        /// `N`
        count: u32,
    }
    => |it| shape(it.count)
}

kernel! {
    /// `out[s] = round( Σ weights[p] · y[p] )` over `p = pairs[first[s]..first[s + 1]]`, in this order.
    CombinePairs("combine_pairs") {
        /// f32 `[P, H]`
        y: Address,
        /// f32 `[P]`
        weights: Address,
        /// u32 `[S + 1]`
        first: Address,
        /// u32, below `P`
        pairs: Address,
        /// bf16 `[S, H]`
        out: Address,
        /// `H`
        hidden: u32,
    } over {
        /// `S`
        slots: u32,
    }
    => |it| shape(it.slots)
}

kernel! {
    /// Norms the latents (eps 1e-6), ropes the keys and writes both into the cache, rounded.
    WriteLatents("write_latents") {
        /// f32 `[T, r + dr]`
        kv: Address,
        /// f32 `[r]`
        gain: Address,
        /// f32 `[positions, dr / 2]`
        cos: Address,
        /// f32 `[positions, dr / 2]`
        sin: Address,
        /// u32 `[T]`
        positions: Address,
        /// u32 `[T]`: `block · 64 + offset`
        slots: Address,
        /// bf16 `[slots, r + dr]`: one layer of the cache
        cache: Address,
        /// `r`
        latent: u32,
        /// `dr`
        rope: u32,
    } over {
        /// `T`
        rows: u32,
    }
    => |it| shape(it.rows)
}
