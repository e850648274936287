//! Logprobs of the model's own distribution, before penalties, bias, temperature and filters.

use conclave_proto::v1::{ScoredToken, TokenLogprob};

use super::order;

/// The log-softmax of one row of logits; all finite.
#[derive(Debug)]
pub struct LogSoftmax<'a> {
    logits: &'a [f32], // [vocab]
    max: f64,
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// Sums in double precision in ascending order of id.
    pub fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|logit| libm::exp(f64::from(*logit) - max)).sum();
        Self { logits, max, log_sum: libm::log(sum) }
    }

    /// The logprob of a token; never below the least finite number.
    pub fn logprob(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize]) - self.max - self.log_sum).max(f64::from(f32::MIN)) as f32
    }

    /// The `count` most likely tokens, best first; of equally likely ones the lower id comes first.
    pub fn top(&self, count: usize) -> Vec<TokenLogprob> {
        let count = count.min(self.logits.len());
        if count == 0 {
            return Vec::new();
        }
        let mut ids: Vec<(u32, f32)> = (0..).zip(self.logits.iter().copied()).collect();
        if count < ids.len() {
            ids.select_nth_unstable_by(count - 1, |a, b| order(*a, *b));
            ids.truncate(count);
        }
        ids.sort_unstable_by(|a, b| order(*a, *b));
        (1..).zip(ids).map(|(rank, (token, _))| TokenLogprob { token, logprob: self.logprob(token), rank }).collect()
    }

    /// A token at a position with its logprob and the `top` most likely ones there.
    pub fn scored(&self, token: u32, position: u32, top: usize) -> ScoredToken {
        ScoredToken { token, position, logprob: Some(self.logprob(token)), top: self.top(top) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_log_of_the_softmax() {
        let logits = [1.0, 2.0, 3.0, -50.0];
        let softmax = LogSoftmax::new(&logits);
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        for (id, logit) in (0..).zip(logits) {
            let expected = (f64::from(logit).exp() / sum).ln();
            assert!((f64::from(softmax.logprob(id)) - expected).abs() < 1e-5);
        }
    }

    #[test]
    fn huge_logits_do_not_overflow() {
        let softmax = LogSoftmax::new(&[3.0e38, -3.0e38, 3.0e38]);
        assert_eq!(softmax.logprob(0), -(2.0f32.ln()));
        assert_eq!(softmax.logprob(1), f32::MIN);
    }

    #[test]
    fn ties_are_ranked_by_id() {
        let softmax = LogSoftmax::new(&[0.5, 2.0, 0.5, 2.0, -0.0, 0.0]);
        let ids = |count| softmax.top(count).iter().map(|entry| (entry.token, entry.rank)).collect::<Vec<_>>();
        assert_eq!(ids(3), [(1, 1), (3, 2), (0, 3)]);
        assert_eq!(ids(99), [(1, 1), (3, 2), (0, 3), (2, 4), (4, 5), (5, 6)]);
        assert_eq!(ids(0), []);
    }
}
