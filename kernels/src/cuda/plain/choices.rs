//! `gate_select.cu`: a block a row.

use super::{Address, Shape, kernel};

/// `GATE_THREADS`.
const THREADS: u32 = 256;

/// Scores are a softmax over all experts.
pub const SCORING_SOFTMAX: u32 = 0;
/// Scores are sigmoids.
pub const SCORING_SIGMOID: u32 = 1;
/// The best experts of all.
pub const METHOD_GREEDY: u32 = 0;
/// The best experts of the groups whose best expert is best.
pub const METHOD_GROUP_LIMITED_GREEDY: u32 = 1;
/// The best experts, a bias added, of the groups whose two best have the largest sum.
pub const METHOD_NOAUX_TC: u32 = 2;
/// Weights are scores times the scale.
pub const RULE_SCALED: u32 = 0;
/// Weights are shares of the sum of the chosen scores.
pub const RULE_NORMALISED: u32 = 1;
/// These shares times the scale.
pub const RULE_NORMALISED_SCALED: u32 = 2;

kernel! {
    /// The experts of each row, ascending, and their weights. Where a logit is not finite, the ids of a row are `u32::MAX`.
    GateSelect("gate_select") {
        /// f32 `[T, E]`
        logits: Address,
        /// f32 `[E]`; 0 unless the method is [`METHOD_NOAUX_TC`]
        bias: Address,
        /// u32 `[T, K]`
        ids: Address,
        /// f32 `[T, K]`
        weights: Address,
        /// `E`, a multiple of the groups
        experts: u32,
        /// `G`
        groups: u32,
        /// Groups that a row may have experts of.
        top_groups: u32,
        /// `K`
        top_k: u32,
        /// `SCORING_…`
        scoring: u32,
        /// `METHOD_…`
        method: u32,
        /// `RULE_…`
        rule: u32,
        /// Multiplies weights.
        scale: f32,
    } over {
        /// `T`
        rows: u32,
    }
    => |it| Shape::new([it.rows, 1, 1], THREADS).with_floats(3 * it.experts + 2 * it.groups)
}
