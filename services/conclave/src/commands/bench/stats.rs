//! Figures from samples.

/// The smallest, the middle and the largest of some samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub min: f64,
    /// Of an even number of samples: between the middle two.
    pub median: f64,
    pub max: f64,
}

impl Summary {
    /// `None` without samples.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = ((sorted.len() - 1) / 2, sorted.len() / 2);
        Some(Self { min, median: (sorted[low] + sorted[high]) / 2.0, max })
    }
}

/// The sample that `percent` of all do not exceed (nearest rank). `None` without samples.
pub fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    let sorted = sorted(samples);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_of_odd_and_even_numbers_of_samples() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[3.0]), Some(Summary { min: 3.0, median: 3.0, max: 3.0 }));
        assert_eq!(Summary::of(&[9.0, 1.0, 2.0]), Some(Summary { min: 1.0, median: 2.0, max: 9.0 }));
        assert_eq!(Summary::of(&[4.0, 1.0, 9.0, 2.0]), Some(Summary { min: 1.0, median: 3.0, max: 9.0 }));
    }

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), Some(100.0));
        assert_eq!(percentile(&samples, 99.0), Some(198.0));
        assert_eq!((percentile(&samples, 0.0), percentile(&samples, 100.0)), (Some(1.0), Some(200.0)));
        assert_eq!((percentile(&[7.0], 99.0), percentile(&[], 50.0)), (Some(7.0), None));
    }
}
