//! Logprobs of the model's own distribution, before penalties, bias, temperature and filters.

use conclave_kernels::FoundToken;

use super::{
    best::{best, largest},
    exp::exp,
};

/// A token, and if `top` is asked for, its logprob by finite logits `[vocab]` and as many of the most likely ones.
pub fn found(logits: &[f32], token: u32, top: Option<usize>) -> FoundToken {
    let Some(top) = top else { return FoundToken { token, logprob: None, top: Vec::new() } };
    let softmax = LogSoftmax::new(logits);
    FoundToken { token, logprob: Some(softmax.logprob(token)), top: softmax.top(top) }
}

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
        let max = f64::from(largest(logits));
        let powers: Vec<f64> = logits.iter().map(|logit| exp(f64::from(*logit) - max)).collect();
        let sum: f64 = powers.iter().sum();
        Self { logits, max, log_sum: libm::log(sum) }
    }

    /// The logprob of a token; never below the least finite number.
    pub fn logprob(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize]) - self.max - self.log_sum).max(f64::from(f32::MIN)) as f32
    }

    /// The `count` most likely tokens with their logprobs, best first; of equally likely ones the lower id comes first.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        best(self.logits, count).into_iter().map(|token| (token, self.logprob(token))).collect()
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
        let ids = |count| softmax.top(count).into_iter().map(|(token, _)| token).collect::<Vec<_>>();
        assert_eq!(ids(3), [1, 3, 0]);
        assert_eq!(ids(99), [1, 3, 0, 2, 4, 5]);
        assert!(ids(0).is_empty());
    }
}
