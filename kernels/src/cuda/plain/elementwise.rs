//! `elementwise.cu`

use super::{Address, Shape, kernel};

const THREADS: u32 = 256;
/// Enough for any chip; beyond, threads take several elements.
const MOST_BLOCKS: u64 = 4096;

fn shape(n: u64) -> Shape {
    Shape::new([n.div_ceil(u64::from(THREADS)).min(MOST_BLOCKS) as u32, 1, 1], THREADS)
}

kernel! {
    /// `out = x`, rounded to bf16.
    RoundBf16("round_bf16") {
        /// f32 `[n]`
        x: Address,
        /// bf16 `[n]`
        out: Address,
        /// Elements.
        n: u64,
    }
    => |it| shape(it.n)
}

kernel! {
    /// `out = x`, from bf16 to f32.
    DecodeBf16("decode_bf16") {
        /// bf16 `[n]`
        x: Address,
        /// f32 `[n]`
        out: Address,
        /// Elements.
        n: u64,
    }
    => |it| shape(it.n)
}

kernel! {
    /// `x += delta`
    Add("add") {
        /// f32 `[n]`
        x: Address,
        /// f32 `[n]`
        delta: Address,
        /// Elements.
        n: u64,
    }
    => |it| shape(it.n)
}

kernel! {
    /// `x += a + b`, the sum of the two first.
    AddTwo("add_two") {
        /// f32 `[n]`
        x: Address,
        /// f32 `[n]`
        a: Address,
        /// f32 `[n]`
        b: Address,
        /// Elements.
        n: u64,
    }
    => |it| shape(it.n)
}

kernel! {
    /// `out = silu(gate) ⊙ up`, rounded to bf16.
    Swiglu("swiglu") {
        /// f32 `[n]`
        gate: Address,
        /// f32 `[n]`
        up: Address,
        /// bf16 `[n]`
        out: Address,
        /// Elements.
        n: u64,
    }
    => |it| shape(it.n)
}
