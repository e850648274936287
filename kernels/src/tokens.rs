//! Tokens found in logits on the device that has them.

/// Which token of a row of logits is asked for, and what of it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenAsk<'a> {
    /// Which.
    pub token: TokenSource<'a>,
    /// If its logprob is asked for: beside so many of the most likely tokens.
    pub top: Option<usize>,
}

/// Where a row's token comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenSource<'a> {
    /// It is known.
    Known(u32),
    /// It is to be drawn.
    Drawn(Drawing<'a>),
}

/// What decides the draw of a row: penalties, then biases; temperature; top-k; top-p over what top-k left; min-p; then the id
/// at which the running sum of weights, ascending by id, passes the fraction `u`.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawing<'a> {
    /// In `[0, 1)`.
    pub u: f64,
    /// 0 = the highest logit, of equals the lowest id.
    pub temperature: f32,
    /// Candidates kept; 0 = all.
    pub top_k: u32,
    /// In `(0, 1]`.
    pub top_p: f32,
    /// In `[0, 1]`, relative to the most likely candidate.
    pub min_p: f32,
    /// Logits of tokens that occurred are divided by it where they are positive, else multiplied; above 0.
    pub repetition_penalty: f32,
    /// Taken once off the logit of what was generated.
    pub presence_penalty: f32,
    /// Taken off for each time it was generated.
    pub frequency_penalty: f32,
    /// The logits that penalties and biases change, each once.
    pub changes: Vec<LogitChange>,
    /// Ids that may not be drawn here, beside those that may not be drawn anywhere.
    pub banned: &'a [u32],
}

/// Why one logit is changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitChange {
    /// Token.
    pub id: u32,
    /// Whether it occurred and there are penalties on that.
    pub occurred: bool,
    /// How often it was generated.
    pub generated: u32,
    /// Added.
    pub bias: f32,
}

/// The token of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundToken {
    /// Which.
    pub token: u32,
    /// If it was asked for: of the model's own distribution, before penalties, biases, temperature and filters.
    pub logprob: Option<f32>,
    /// The most likely tokens with their logprobs, best first, of equals the lower id.
    pub top: Vec<(u32, f32)>,
}
