//! The tokens that one is drawn from.

use super::{Params, best::best, exp::exp};

/// Tokens with their shares of the probability, ascending by id. Shares are not normalised: the best token of all has 1, and
/// one that cannot be drawn 0.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidates {
    /// None: those of the whole vocabulary, each at its place.
    ids: Option<Vec<u32>>,
    logits: Vec<f32>,
    weights: Vec<f64>,
}

impl Candidates {
    /// Those that the settings leave of adjusted logits `[vocab]`, the largest of which is `max`. Ids of negative infinity
    /// cannot be drawn.
    pub(super) fn new(params: &Params, logits: Vec<f32>, max: f32) -> Self {
        let (ids, logits) = if (1..logits.len()).contains(&params.top_k) {
            let mut ids = best(&logits, params.top_k);
            ids.sort_unstable();
            let of_ids = ids.iter().map(|id| logits[*id as usize]).collect();
            (Some(ids), of_ids)
        } else {
            (None, logits)
        };
        let (max, temperature) = (f64::from(max), f64::from(params.temperature));
        let weights = logits.iter().map(|logit| exp((f64::from(*logit) - max) / temperature)).collect();
        let mut candidates = Self { ids, logits, weights };
        if params.top_p < 1.0 {
            candidates.keep(&candidates.nucleus(f64::from(params.top_p)));
        }
        if params.min_p > 0.0 {
            candidates.keep(&candidates.likely(f64::from(params.min_p)));
        }
        candidates
    }

    /// Which these are.
    #[cfg(test)]
    pub(super) fn ids(&self) -> Vec<u32> {
        (0..self.weights.len()).map(|place| self.id(place)).collect()
    }

    fn id(&self, place: usize) -> u32 {
        self.ids.as_ref().map_or(place as u32, |ids| ids[place])
    }

    /// The id at which the running sum of weights passes the fraction `u` of all of it.
    pub(super) fn draw(&self, u: f64) -> u32 {
        let wanted = u * self.total();
        let mut sum = 0.0;
        let passes = self.weights.iter().position(|weight| {
            sum += weight;
            sum > wanted
        });
        // The best candidate has weight 1 and u is below 1: some candidate passes, but for rounding.
        let last = || self.weights.iter().rposition(|weight| *weight > 0.0);
        passes.or_else(last).map_or(0, |place| self.id(place))
    }

    fn total(&self) -> f64 {
        self.weights.iter().sum()
    }

    /// Keeps those at some places, which ascend.
    fn keep(&mut self, places: &[usize]) {
        self.ids = Some(places.iter().map(|at| self.id(*at)).collect());
        self.logits = places.iter().map(|at| self.logits[*at]).collect();
        self.weights = places.iter().map(|at| self.weights[*at]).collect();
    }

    /// Places of those whose weight is at least `least`.
    fn likely(&self, least: f64) -> Vec<usize> {
        (0..).zip(&self.weights).filter(|(_, weight)| **weight >= least).map(|(at, _)| at).collect()
    }

    /// Places of the fewest best whose share of all weights is at least `top_p`.
    fn nucleus(&self, top_p: f64) -> Vec<usize> {
        let wanted = top_p * self.total();
        // Sorted only as far as needed: the nucleus is mostly a small part of the vocabulary.
        let mut sorted = 64;
        loop {
            let best = best(&self.logits, sorted);
            let mut sum = 0.0;
            let reached = best.iter().position(|at| {
                sum += self.weights[*at as usize];
                sum >= wanted
            });
            if reached.is_some() || sorted >= self.weights.len() {
                let count = reached.map_or(best.len(), |last| last + 1);
                let mut places: Vec<usize> = best[..count].iter().map(|at| *at as usize).collect();
                places.sort_unstable();
                return places;
            }
            sorted *= 8;
        }
    }
}
