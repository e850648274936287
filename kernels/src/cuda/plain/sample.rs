//! `sample.cu`

use bytemuck::{Pod, Zeroable};

use super::{Address, Shape, kernel};

/// `SAMPLE_THREADS` of `sample.cuh`.
const THREADS: u32 = 512;
const ADJUST_THREADS: u32 = 256;

/// What decides the draw of a row.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// In `[0, 1)`.
    pub u: f64,
    /// 0 = the highest logit.
    pub temperature: f32,
    /// Candidates kept; 0 = all.
    pub top_k: u32,
    /// In `(0, 1]`.
    pub top_p: f32,
    /// In `[0, 1]`, relative to the most likely candidate.
    pub min_p: f32,
}

/// What changes one logit.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Adjustment {
    /// Row of the logits.
    pub row: u32,
    /// Token.
    pub id: u32,
    /// 1 if the token is in the prompt or was generated, else 0.
    pub occurred: u32,
    /// How often it was generated.
    pub generated: u32,
    /// Added.
    pub bias: f32,
}

/// The penalties of a row.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Penalties {
    /// Above 0; 1 = none.
    pub repetition: f32,
    /// Taken once off the logit of what was generated.
    pub presence: f32,
    /// Taken off for each time it was generated.
    pub frequency: f32,
}

kernel! {
    /// Draws a token from each row: temperature, top-k, top-p over what top-k left, min-p, then the id at which the running
    /// sum of weights passes the fraction `u`. `u32::MAX` where a logit is NaN or infinite (−∞ is a token that may not be
    /// drawn) or no token may be drawn.
    Sample("sample") {
        /// f32 `[T, V]`
        logits: Address,
        /// u32 `[ceil(V / 32)]`: bits of the ids that may be drawn; or 0
        allowed: Address,
        /// [`Draw`] `[T]`
        draws: Address,
        /// f64 `[T, V]`, for the kernel's own use
        weights: Address,
        /// u32 `[T]`
        out: Address,
        /// `V`
        vocab: u32,
    } over {
        /// `T`
        rows: u32,
    }
    => |it| Shape::new([it.rows, 1, 1], THREADS)
}

kernel! {
    /// Penalties, then biases, before [`Sample`] or [`Argmax`](super::Argmax).
    AdjustLogits("adjust_logits") {
        /// f32 `[T, V]`
        logits: Address,
        /// [`Adjustment`] `[count]`, each of another logit
        changes: Address,
        /// [`Penalties`] `[T]`
        penalties: Address,
        /// `V`
        vocab: u32,
        /// Changes.
        count: u32,
    }
    => |it| Shape::new([it.count.div_ceil(ADJUST_THREADS), 1, 1], ADJUST_THREADS)
}
