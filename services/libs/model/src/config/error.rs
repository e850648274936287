//! Why a `config.json` is refused.

use crate::json::JsonError;

/// Why a `config.json` is refused: the field, what was found, what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// Malformed, or a field that is missing, of another type or out of its bounds.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// Another model family.
    #[error("model_type: found {found}, expected \"deepseek_v2\" or \"deepseek_v3\"")]
    ModelType { found: String },
    /// Another activation function.
    #[error("hidden_act: found {found}, expected \"silu\"")]
    HiddenAct { found: String },
    /// Biases on the attention projections.
    #[error("attention_bias: found true, expected false (biases are not implemented)")]
    AttentionBias,
    /// Biases in the FFN.
    #[error("mlp_bias: found true, expected false (biases are not implemented)")]
    MlpBias,
    /// lm_head shared with the embedding.
    #[error("tie_word_embeddings: found true, expected false (lm_head must be a tensor of its own)")]
    TiedEmbeddings,
    /// Grouped keys.
    #[error("num_key_value_heads: found {found}, expected num_attention_heads = {expected}")]
    KeyValueHeads { found: u64, expected: u64 },
    /// Neither YaRN nor plain.
    #[error("{field}: found {found}, expected \"yarn\" or \"default\"")]
    RopeType { field: String, found: String },
    /// An option of YaRN that changes its mathematics.
    #[error("{field}: found {found}, expected it to be absent (not implemented)")]
    RopeOption { field: String, found: String },
    /// The two spellings of the rotary embedding disagree.
    #[error("rope_parameters: found {found}, expected the same as rope_theta and rope_scaling: {expected}")]
    RopeConflict { found: String, expected: String },
    /// YaRN that shrinks to nothing.
    #[error("{field}: found {found}, expected a finite number above 0")]
    RopeFactor { field: String, found: f64 },
    /// Rotary rows that make no pairs.
    #[error("qk_rope_head_dim: found {found}, expected an even number")]
    OddRope { found: usize },
    /// A gate that is not known.
    #[error("topk_method: found {found}, expected \"greedy\", \"group_limited_greedy\" or \"noaux_tc\"")]
    TopkMethod { found: String },
    /// Scores that are not known.
    #[error("scoring_func: found {found}, expected \"softmax\" or \"sigmoid\"")]
    ScoringFunc { found: String },
    /// A gate with scores it was never trained with.
    #[error("scoring_func: found \"{found}\" with topk_method \"{method}\", expected \"{expected}\"")]
    GateCombination { found: &'static str, method: &'static str, expected: &'static str },
    /// Groups given to a gate that ignores them: implementations disagree on it.
    #[error("n_group: found {found} with topk_method \"greedy\", expected 1")]
    GreedyWithGroups { found: usize },
    /// Experts that do not divide into groups.
    #[error("n_group: found {groups}, expected a divisor of n_routed_experts = {experts}")]
    UnevenGroups { groups: usize, experts: usize },
    /// More groups kept than there are.
    #[error("topk_group: found {found}, expected at most n_group = {groups}")]
    TopkGroups { found: usize, groups: usize },
    /// More experts chosen than there are.
    #[error("num_experts_per_tok: found {found}, expected at most n_routed_experts = {experts}")]
    TooManyExperts { found: usize, experts: usize },
    /// More experts chosen than the kept groups have.
    #[error("num_experts_per_tok: found {found}, expected at most {candidates} (topk_group × experts per group)")]
    TooFewCandidates { found: usize, candidates: usize },
    /// No period of MoE layers.
    #[error("moe_layer_freq: found {found}, expected at least 1")]
    MoeLayerFreq { found: String },
    /// Normalised weights with a factor: implementations disagree on it.
    #[error("norm_topk_prob: found true with routed_scaling_factor {factor}, expected false or a factor of 1")]
    NormWithFactor { factor: f32 },
    /// A quantisation that is not known.
    #[error("quantization_config.{field}: found {found}, expected {expected}")]
    Quantization { field: String, found: String, expected: &'static str },
    /// A token id past the vocabulary.
    #[error("{field}: found {found}, expected less than vocab_size = {vocab}")]
    TokenId { field: String, found: u32, vocab: usize },
    /// Sizes whose product no machine holds.
    #[error("{what}: found {found}, expected at most {limit}")]
    TooLarge { what: &'static str, found: u128, limit: u128 },
}
