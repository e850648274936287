//! From the logits of a position to its token.
//!
//! In order: repetition penalty (prompt and output), presence and frequency penalties (output), logit bias; ids without a
//! string and, before `min_tokens`, stop ids are taken out; temperature; top-k; top-p over what top-k left; min-p; one
//! draw keyed by (seed, choice, position). At temperature 0 the highest logit wins, the lowest id among equals. All sums
//! are in double precision and in a fixed order, so that the same logits give the same token on every machine.
//!
//! A device that finds tokens itself gets the same settings (`asks.rs`) and draws by these rules; its sums may round otherwise.

mod asks;
mod history;
mod logprobs;
mod mask;
mod params;
mod random;

use std::cmp::Ordering;

use conclave_serve::{Error, ErrorKind};

pub use history::{Count, History};
pub use logprobs::LogSoftmax;
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
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(id) => {
            let message = format!("logits at position {position}: found {} for id {id}, expected finite", logits[id]);
            Err(Error::new(ErrorKind::Internal, message))
        }
    }
}

/// Draws the token at a position from finite logits `[vocab]`.
///
/// # Errors
/// When no id may be drawn.
pub fn sample(params: &Params, mask: &TokenMask, logits: &[f32], at: Position<'_>) -> Result<u32, Error> {
    let candidates = candidates(params, mask, logits, at);
    let Some(best) = candidates.iter().copied().min_by(|a, b| order(*a, *b)) else {
        return Err(Error::invalid(format!(
            "position {}: every id is masked, expected at least one allowed",
            at.position
        )));
    };
    if params.temperature == 0.0 {
        return Ok(best.0);
    }
    let u = random::draw(params.seed, at.choice, at.position);
    Ok(pick(params, candidates, best.1, u))
}

/// The ids that may be drawn, ascending, with their adjusted logits.
fn candidates(params: &Params, mask: &TokenMask, logits: &[f32], at: Position<'_>) -> Vec<(u32, f32)> {
    let mut adjusted = logits.to_vec();
    params.penalise(&mut adjusted, at.history);
    params.bias.iter().for_each(|(id, bias)| adjusted[*id as usize] += bias);
    // A penalty may push a logit out of the range of f32: as unlikely, or as likely, as can be.
    (0..)
        .zip(adjusted)
        .filter(|(id, _)| mask.allows(*id) && !at.banned.contains(id))
        .map(|(id, logit)| (id, logit.clamp(f32::MIN, f32::MAX)))
        .collect()
}

/// A candidate with its share of the probability, not normalised: the best one has 1.
#[derive(Debug, Clone, Copy)]
struct Weighted {
    id: u32,
    logit: f32,
    weight: f64,
}

/// Draws from candidates in ascending order of id, whose best logit is `max`.
fn pick(params: &Params, mut candidates: Vec<(u32, f32)>, max: f32, u: f64) -> u32 {
    if params.top_k > 0 && params.top_k < candidates.len() {
        candidates.select_nth_unstable_by(params.top_k, |a, b| order(*a, *b));
        candidates.truncate(params.top_k);
        candidates.sort_unstable_by_key(|(id, _)| *id);
    }
    let mut weighted = weigh(&candidates, max, params.temperature);
    if params.top_p < 1.0 {
        keep_nucleus(&mut weighted, f64::from(params.top_p));
    }
    if params.min_p > 0.0 {
        weighted.retain(|candidate| candidate.weight >= f64::from(params.min_p));
    }
    walk(&weighted, u)
}

fn weigh(candidates: &[(u32, f32)], max: f32, temperature: f32) -> Vec<Weighted> {
    let weight = |logit: f32| libm::exp((f64::from(logit) - f64::from(max)) / f64::from(temperature));
    candidates.iter().map(|(id, logit)| Weighted { id: *id, logit: *logit, weight: weight(*logit) }).collect()
}

/// The id at which the running sum of weights passes the fraction `u` of all of it.
fn walk(candidates: &[Weighted], u: f64) -> u32 {
    let wanted = u * total(candidates);
    let mut sum = 0.0;
    let passes = candidates.iter().find(|candidate| {
        sum += candidate.weight;
        sum > wanted
    });
    // The best candidate has weight 1 and u is below 1, so that some candidate passes.
    passes.or(candidates.last()).map_or(0, |candidate| candidate.id)
}

/// Keeps the fewest best candidates whose share of all weights is at least `top_p`, ascending by id.
fn keep_nucleus(candidates: &mut Vec<Weighted>, top_p: f64) {
    let wanted = top_p * total(candidates);
    // Sorted only as far as needed: the nucleus is mostly a small part of the vocabulary.
    let mut sorted = 64;
    let kept = loop {
        best_first(candidates, sorted);
        let mut sum = 0.0;
        let reached = candidates.iter().take(sorted).position(|candidate| {
            sum += candidate.weight;
            sum >= wanted
        });
        match reached {
            Some(last) => break last + 1,
            None if sorted >= candidates.len() => break candidates.len(),
            None => sorted *= 8,
        }
    };
    candidates.truncate(kept);
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

/// Puts the best `count` first, in order.
fn best_first(candidates: &mut [Weighted], count: usize) {
    let by = |a: &Weighted, b: &Weighted| order((a.id, a.logit), (b.id, b.logit));
    let count = count.min(candidates.len());
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, by);
    }
    candidates[..count].sort_unstable_by(by);
}

fn total(candidates: &[Weighted]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

#[cfg(test)]
mod tests;
