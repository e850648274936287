//! From the logits of a position to its token.
//!
//! In order: repetition penalty (prompt and output), presence and frequency penalties (output), logit bias; ids without a
//! string and, before `min_tokens`, stop ids are taken out; temperature; top-k; top-p over what top-k left; min-p; one
//! draw keyed by (seed, choice, position). At temperature 0 the highest logit wins, the lowest id among equals. All sums
//! are in double precision and in a fixed order, so that the same logits give the same token on every machine.
//!
//! A device that finds tokens itself gets the same settings (`asks.rs`) and draws by these rules; its sums may round otherwise.

mod asks;
mod best;
mod candidates;
mod exp;
mod history;
mod logprobs;
mod mask;
mod params;
mod random;

use std::cmp::Ordering;

use conclave_serve::{Error, ErrorKind};

use self::candidates::Candidates;
pub use history::{Count, History};
pub use logprobs::{LogSoftmax, found};
pub use mask::TokenMask;
pub use params::Params;
pub use random::draw;

/// A position to sample.
#[derive(Debug, Clone, Copy)]
pub struct Position<'a> {
    /// Index in the sequence of the token to be drawn.
    pub position: u32,
    /// Which of several independent continuations of one prompt this is.
    pub choice: u32,
    /// What comes before.
    pub history: &'a History,
    /// Ids that may not be drawn here: the stop ids, before `min_tokens`.
    pub banned: &'a [u32],
}

/// Best first: the higher logit, then the lower id.
pub(crate) fn order(a: (u32, f32), b: (u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// Whether the model computed numbers.
///
/// # Errors
/// Internal, naming the first id whose logit is none.
pub fn check_finite(logits: &[f32], position: u32) -> Result<(), Error> {
    // All of them, so that several are looked at together; only then which.
    if logits.iter().fold(true, |finite, logit| finite & logit.is_finite()) {
        return Ok(());
    }
    let (id, logit) = (0..).zip(logits).find(|(_, logit)| !logit.is_finite()).unwrap_or((0, &f32::NAN));
    let message = format!("logits at position {position}: found {logit} for id {id}, expected finite");
    Err(Error::new(ErrorKind::Internal, message))
}

/// Draws the token at a position from finite logits `[vocab]`.
///
/// # Errors
/// When no id may be drawn.
pub fn sample(params: &Params, mask: &TokenMask, logits: &[f32], at: Position<'_>) -> Result<u32, Error> {
    let logits = adjusted(params, mask, logits, at);
    let max = best::largest(&logits);
    if max == f32::NEG_INFINITY {
        let message = format!("position {}: every id is masked, expected at least one allowed", at.position);
        return Err(Error::invalid(message));
    }
    if params.temperature == 0.0 {
        return Ok(best::place_of(max, &logits) as u32);
    }
    Ok(Candidates::new(params, logits, max).draw(random::draw(params.seed, at.choice, at.position)))
}

/// The logits that decide, those of ids that may not be drawn being negative infinity.
fn adjusted(params: &Params, mask: &TokenMask, logits: &[f32], at: Position<'_>) -> Vec<f32> {
    let mut adjusted = logits.to_vec();
    if params.penalises() || !params.bias.is_empty() {
        params.penalise(&mut adjusted, at.history);
        params.bias.iter().for_each(|(id, bias)| adjusted[*id as usize] += bias);
        // A penalty may push a logit out of the range of f32: as unlikely, or as likely, as can be.
        adjusted.iter_mut().for_each(|logit| *logit = logit.clamp(f32::MIN, f32::MAX));
    }
    mask.take_out(&mut adjusted);
    for id in at.banned {
        if let Some(logit) = adjusted.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    adjusted
}

#[cfg(test)]
mod tests;
