//! The sampling settings of a request, checked.

use conclave_proto::v1::Sampling;
use conclave_serve::Error;

use super::History;

/// Most entries of a logit bias.
const MAX_BIASES: usize = 1024;

/// Checked settings; the neutral value of each does nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Effective seed.
    pub seed: u64,
    /// 0 = greedy.
    pub temperature: f32,
    /// Candidates kept; 0 = all.
    pub top_k: usize,
    /// In (0, 1].
    pub top_p: f32,
    /// In [0, 1], relative to the most likely candidate.
    pub min_p: f32,
    /// Above 0; 1 = none.
    pub repetition_penalty: f32,
    /// Taken once off the logit of what was generated.
    pub presence_penalty: f32,
    /// Taken off for each time it was generated.
    pub frequency_penalty: f32,
    /// Added to logits, ascending by id.
    pub bias: Vec<(u32, f32)>,
    /// Tokens before a stop token may be drawn.
    pub min_tokens: usize,
}

impl Params {
    /// Checks the settings of a request; missing ones are the proto's zeros, which is an error where zero has no meaning.
    ///
    /// # Errors
    /// Names the field, what was found and what was expected.
    pub fn new(sampling: &Sampling, vocab: usize) -> Result<Self, Error> {
        check("temperature", sampling.temperature, "finite and at least 0", |x| x >= 0.0)?;
        check("top_p", sampling.top_p, "above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?;
        check("min_p", sampling.min_p, "between 0 and 1", |x| (0.0..=1.0).contains(&x))?;
        check("repetition_penalty", sampling.repetition_penalty, "finite and above 0", |x| x > 0.0)?;
        check("presence_penalty", sampling.presence_penalty, "finite", |_| true)?;
        check("frequency_penalty", sampling.frequency_penalty, "finite", |_| true)?;
        Ok(Self {
            seed: sampling.seed,
            temperature: sampling.temperature,
            top_k: sampling.top_k as usize,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            bias: bias(sampling, vocab)?,
            min_tokens: sampling.min_tokens as usize,
        })
    }

    /// Whether any of the three penalties does anything.
    pub(super) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Applies the three penalties to logits `[vocab]`.
    pub(crate) fn penalise(&self, logits: &mut [f32], history: &History) {
        if !self.penalises() {
            return;
        }
        for (token, count) in history.iter() {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            if count.output > 0 {
                *logit -= self.presence_penalty + self.frequency_penalty * count.output as f32;
            }
        }
    }
}

fn check(field: &str, value: f32, expected: &str, right: impl Fn(f32) -> bool) -> Result<(), Error> {
    if value.is_finite() && right(value) {
        return Ok(());
    }
    Err(Error::invalid(format!("{field}: found {value}, expected {expected}")).with_param(field))
}

fn bias(sampling: &Sampling, vocab: usize) -> Result<Vec<(u32, f32)>, Error> {
    let wrong = |message: String| Err(Error::invalid(message).with_param("logit_bias"));
    if sampling.logit_bias.len() > MAX_BIASES {
        return wrong(format!(
            "logit_bias: found {} entries, expected at most {MAX_BIASES}",
            sampling.logit_bias.len()
        ));
    }
    let mut entries: Vec<(u32, f32)> = sampling.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect();
    entries.sort_unstable_by_key(|(id, _)| *id);
    for (id, bias) in &entries {
        if *id as usize >= vocab {
            return wrong(format!("logit_bias: found id {id}, expected ids below {vocab}"));
        }
        if !bias.is_finite() {
            return wrong(format!("logit_bias: found {bias} for id {id}, expected finite"));
        }
    }
    Ok(entries)
}
