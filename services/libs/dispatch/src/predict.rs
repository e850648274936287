//! How long a shard will take, learnt from how long it took; and how many hedges that allows. Pure.

use std::time::Duration;

use crate::config::DispatchConfig;

/// Answers before a prediction is trusted.
const TRUSTED_SAMPLES: u32 = 8;
/// What an older sample still counts after a new one.
const DECAY: f64 = 0.9;
/// Reading an expert's weights, in pairs.
const EXPERT_UNITS: f64 = 8.0;
/// Payload of one unit.
const BYTES_PER_UNIT: f64 = 16_384.0;
/// A hang is declared after this long where nothing has been learnt yet.
const UNKNOWN_HANG: Duration = Duration::from_secs(5);

/// Size of a piece of work, for comparing with others at the same shard.
pub(crate) fn units(pairs: usize, experts: usize, bytes: usize) -> f64 {
    4.0 + pairs as f64 + experts as f64 * EXPERT_UNITS + bytes as f64 / BYTES_PER_UNIT
}

/// The speed of one shard.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rate {
    us: f64,
    units: f64,
    samples: u32,
}

impl Rate {
    /// Work of `units` took `took`.
    pub(crate) fn learn(&mut self, units: f64, took: Duration) {
        self.us = self.us * DECAY + took.as_secs_f64() * 1e6;
        self.units = self.units * DECAY + units;
        self.samples = self.samples.saturating_add(1);
    }

    /// How long work of `units` will take, once enough is known.
    pub(crate) fn predict(&self, units: f64) -> Option<Duration> {
        (self.samples >= TRUSTED_SAMPLES).then(|| Duration::from_secs_f64(self.us / self.units * units / 1e6))
    }

    /// Time of one more (row, expert) pair in µs, once anything is known.
    pub(crate) fn us_per_pair(&self) -> Option<f64> {
        (self.samples > 0).then(|| self.us / self.units)
    }
}

/// When to ask a second shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience {
    /// After this long a hedge may go out; `None` while nothing is known.
    pub(crate) hedge: Option<Duration>,
    /// After this long the shard counts as hanging.
    pub(crate) hang: Duration,
}

impl Patience {
    /// Hedge after max(floor, 3 × predicted), hang after max(floor, 10 × predicted).
    pub(crate) fn new(config: &DispatchConfig, predicted: Option<Duration>) -> Self {
        match predicted {
            None => Self { hedge: None, hang: UNKNOWN_HANG.max(config.hang_floor) },
            Some(predicted) => Self {
                hedge: Some((predicted * 3).max(config.hedge_floor)),
                hang: (predicted * 10).max(config.hang_floor),
            },
        }
    }
}

/// Lets a fixed share of calls be hedged: every call earns a thousandth part of a hedge for each permille.
#[derive(Debug, Default)]
pub(crate) struct HedgeBudget {
    earned: u32,
}

impl HedgeBudget {
    const HEDGE: u32 = 1000;
    const MOST: u32 = 8 * Self::HEDGE;

    /// A call went out.
    pub(crate) fn earn(&mut self, permille: u32) {
        self.earned = (self.earned + permille).min(Self::MOST);
    }

    /// Takes a hedge out, if one has been earned.
    pub(crate) fn take(&mut self) -> bool {
        let enough = self.earned >= Self::HEDGE;
        if enough {
            self.earned -= Self::HEDGE;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_what_was_seen() {
        let mut rate = Rate::default();
        assert_eq!(rate.predict(10.0), None);
        (0..8).for_each(|_| rate.learn(10.0, Duration::from_millis(10)));
        let predicted = rate.predict(20.0).unwrap();
        assert!((predicted.as_secs_f64() - 0.020).abs() < 1e-6, "{predicted:?}");
        (0..200).for_each(|_| rate.learn(10.0, Duration::from_millis(30)));
        assert!((rate.predict(20.0).unwrap().as_secs_f64() - 0.060).abs() < 1e-4);
    }

    #[test]
    fn patience_has_floors() {
        let config = DispatchConfig::new("f");
        let quick = Patience::new(&config, Some(Duration::from_millis(1)));
        assert_eq!(quick, Patience { hedge: Some(Duration::from_millis(20)), hang: Duration::from_secs(1) });
        let slow = Patience::new(&config, Some(Duration::from_millis(500)));
        assert_eq!(slow, Patience { hedge: Some(Duration::from_millis(1500)), hang: Duration::from_secs(5) });
        assert_eq!(Patience::new(&config, None).hedge, None);
    }

    #[test]
    fn two_percent_of_calls_are_hedged_at_most() {
        let mut budget = HedgeBudget::default();
        let hedges = (0..1000).filter(|_| {
            budget.earn(20);
            budget.take()
        });
        assert_eq!(hedges.count(), 20);
    }
}
