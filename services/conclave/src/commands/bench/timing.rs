//! From the arrival times of tokens to rates.

use std::ops::Range;

/// Seconds at which each token of each stream arrived.
pub type Arrivals = Vec<Vec<f64>>;

/// What streams did while all of them were past their first token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Steady {
    /// Tokens a second, of all streams together.
    pub rate: f64,
    /// Seconds between a token and the next of the same stream.
    pub gaps: Vec<f64>,
    /// Tokens that a stream had on average in the middle of the time looked at.
    pub middle: f64,
}

/// Looks at the time from the moment when the last stream has its first token until the first stream has its last one:
/// only decode steps of all streams, no prefill. The tokens of one step arrive close together, so each stream counts
/// from its token nearest to that beginning up to its token nearest to that end. `None` where a stream has no two such
/// tokens.
pub fn steady(streams: &[Vec<f64>]) -> Option<Steady> {
    let begin = streams.iter().map(|times| times.first()).collect::<Option<Vec<_>>>()?.into_iter().fold(0.0, max);
    let end = streams.iter().filter_map(|times| times.last()).fold(f64::INFINITY, |a, b| a.min(*b));
    let mut steady = Steady::default();
    for times in streams {
        let (first, last) = (nearest(times, begin)?, nearest(times, end)?);
        if first >= last || times[last] <= times[first] {
            return None;
        }
        steady.rate += (last - first) as f64 / (times[last] - times[first]);
        steady.gaps.extend(times[first..=last].windows(2).map(|pair| pair[1] - pair[0]));
        steady.middle += (first + last) as f64 / 2.0 / streams.len() as f64;
    }
    (!streams.is_empty()).then_some(steady)
}

/// Tokens that each stream has had since the last of them had its first, that one counted.
pub fn together(streams: &[Vec<f64>]) -> usize {
    let Some(begin) = streams.iter().map(|times| times.first().copied()).collect::<Option<Vec<f64>>>() else {
        return 0;
    };
    let begin = begin.into_iter().fold(0.0, f64::max);
    streams.iter().map(|times| times.iter().filter(|time| **time >= begin).count()).min().unwrap_or(0)
}

/// What streams did while prompts arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// Tokens a second of all streams together, before.
    pub before: f64,
    /// Seconds between a token and the next of the same stream.
    pub gaps: Vec<f64>,
    /// Tokens of the streams.
    pub tokens: usize,
    /// For so long.
    pub seconds: f64,
}

/// Looks at streams that decode before and within `window`, and a little longer. `None` where they did not.
pub fn mixture(streams: &[Vec<f64>], window: &Range<f64>) -> Option<Mixture> {
    let until = |end: f64| move |times: &Vec<f64>| times.iter().copied().filter(|time| *time <= end).collect();
    let before: Arrivals = streams.iter().map(until(window.start)).collect();
    let within = |time: &f64| window.start < *time && *time <= window.end;
    let touches = |pair: &&[f64]| pair[1] > window.start && pair[0] < window.end;
    let gaps = |times: &Vec<f64>| times.windows(2).filter(touches).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>();
    Some(Mixture {
        before: steady(&before)?.rate,
        gaps: streams.iter().flat_map(gaps).collect(),
        tokens: streams.iter().flatten().filter(|time| within(time)).count(),
        seconds: window.end - window.start,
    })
}

fn max(a: f64, b: &f64) -> f64 {
    a.max(*b)
}

/// Index of the time nearest to `to`.
fn nearest(times: &[f64], to: f64) -> Option<usize> {
    (0..times.len()).min_by(|a, b| (times[*a] - to).abs().total_cmp(&(times[*b] - to).abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stream_counts_from_its_first_token() {
        let found = steady(&[vec![3.0, 3.5, 4.0, 4.5, 5.0]]).unwrap();
        assert_eq!((found.rate, found.gaps, found.middle), (2.0, vec![0.5; 4], 2.0));
    }

    #[test]
    fn streams_count_while_all_of_them_decode() {
        // The first stream gets slow tokens while the second is in its prefill, and ends first.
        let first = vec![1.0, 2.0, 3.0, 3.1, 3.2, 3.3];
        let second = vec![3.01, 3.11, 3.21, 3.31, 3.36, 3.41];
        let found = steady(&[first, second]).unwrap();
        assert!((found.rate - 20.0).abs() < 1e-9, "{found:?}");
        assert_eq!(found.gaps.len(), 6);
        assert_eq!(found.middle, (3.5 + 1.5) / 2.0);
    }

    #[test]
    fn streams_are_together_from_the_first_token_of_the_last() {
        assert_eq!(together(&[vec![1.0, 2.0, 3.0, 4.0], vec![3.0, 4.0]]), 2);
        assert_eq!((together(&[vec![1.0, 2.0], vec![]]), together(&[])), (0, 0));
    }

    #[test]
    fn a_mixture_counts_what_happens_while_prompts_are_there() {
        let first = vec![1.0, 1.5, 2.0, 3.0, 5.0, 5.5, 6.0];
        let second = vec![1.0, 1.5, 2.0, 3.5, 5.0, 5.5];
        let found = mixture(&[first, second], &(2.25..5.25)).unwrap();
        assert_eq!((found.before, found.tokens, found.seconds), (4.0, 4, 3.0));
        assert_eq!(found.gaps, [1.0, 2.0, 0.5, 1.5, 1.5, 0.5]);
        assert_eq!(mixture(&[vec![1.0, 3.0]], &(2.0..4.0)), None, "no two tokens before");
    }

    #[test]
    fn nothing_to_measure_is_none() {
        assert_eq!(steady(&[]), None);
        assert_eq!(steady(&[vec![]]), None);
        assert_eq!(steady(&[vec![1.0]]), None);
        assert_eq!(steady(&[vec![1.0, 2.0], vec![2.1]]), None, "the second stream has no second token");
    }
}
