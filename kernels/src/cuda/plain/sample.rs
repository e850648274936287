//! `sample.cu` and `score.cu`: a block a row.

use bytemuck::{Pod, Zeroable};

use super::{Address, Shape, kernel};

/// `RANK_THREADS` of `ranks.cuh`.
const THREADS: u32 = 512;
const ADJUST_THREADS: u32 = 256;
/// Logits that a row of [`Sample`] and [`Score`] has at most: `TILE` for each of the threads.
pub const MOST_LOGITS: usize = (THREADS * THREADS * 4) as usize;
/// Most likely tokens that a row of [`Score`] gets at most: `LISTED` of `best.cuh`.
pub const MOST_LIKELY: usize = 1024;

/// What decides the draw of a row.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// In `[0, 1)`.
    pub u: f64,
    /// Of the logits.
    pub row: u32,
    /// Which of the masks says what may be drawn.
    pub mask: u32,
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
    /// What the logit was: written by [`AdjustLogits`].
    pub before: f32,
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

/// A row whose score is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Scored {
    /// Of the logits.
    pub row: u32,
    /// Most likely tokens, at most [`MOST_LIKELY`] and as many as there are.
    pub top: u32,
}

/// What the logprob of a row's token is computed from.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct RowScore {
    /// Of `exp(logit − best)` over the row; 0 where a logit is not finite or there is no token.
    pub sum: f64,
    /// The highest logit.
    pub best: f32,
    /// That of the row's token.
    pub logit: f32,
}

/// One of the most likely tokens.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Likely {
    /// Token.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
}

kernel! {
    /// Draws a token from rows: temperature, top-k, top-p over what top-k left, min-p, then the id at which the running sum of
    /// weights passes the fraction `u`. `u32::MAX` where a logit is not finite or no token may be drawn.
    Sample("sample") {
        /// f32 `[R, V]`, `V` at most [`MOST_LOGITS`]
        logits: Address,
        /// [`Draw`] `[N]`, each of another row
        draws: Address,
        /// u32 `[M, words]`: bits of the ids that may be drawn
        masks: Address,
        /// u32 `[R]`; those of other rows stay
        tokens: Address,
        /// `V`
        vocab: u32,
        /// Of a mask; at least `ceil(V / 32)`.
        words: u32,
    } over {
        /// `N`
        draw_count: u32,
    }
    => |it| Shape::new([it.draw_count, 1, 1], THREADS)
}

kernel! {
    /// Penalties, then biases, before [`Sample`].
    AdjustLogits("adjust_logits") {
        /// f32 `[R, V]`
        logits: Address,
        /// [`Adjustment`] `[count]`, each of another logit
        changes: Address,
        /// [`Penalties`] `[R]`
        penalties: Address,
        /// `V`
        vocab: u32,
        /// Changes.
        count: u32,
    }
    => |it| Shape::new([it.count.div_ceil(ADJUST_THREADS), 1, 1], ADJUST_THREADS)
}

kernel! {
    /// The logits as they were before [`AdjustLogits`].
    RestoreLogits("restore_logits") {
        /// f32 `[R, V]`
        logits: Address,
        /// [`Adjustment`] `[count]`
        changes: Address,
        /// `V`
        vocab: u32,
        /// Changes.
        count: u32,
    }
    => |it| Shape::new([it.count.div_ceil(ADJUST_THREADS), 1, 1], ADJUST_THREADS)
}

kernel! {
    /// Scores rows for their tokens.
    Score("score") {
        /// f32 `[R, V]`, `V` at most [`MOST_LOGITS`]
        logits: Address,
        /// [`Scored`] `[S]`
        asked: Address,
        /// u32 `[R]`: `u32::MAX` where there is no token
        tokens: Address,
        /// [`RowScore`] `[S]`
        out: Address,
        /// [`Likely`] `[S, pitch]`: as many as are asked for, best first, of equals the lower id
        likely: Address,
        /// `V`
        vocab: u32,
        /// At least what any row asks for.
        pitch: u32,
    } over {
        /// `S`
        rows: u32,
    }
    => |it| Shape::new([it.rows, 1, 1], THREADS)
}
