//! Whether a step runs whole or as two micro-batches.
//!
//! Of two, one has its segment while the rows of the other are with the routed experts. That hides waiting, and reads all
//! weights twice. Which of the two is faster depends on network, experts and device: where the wait is worth hiding, both ways
//! are tried and measured, and tried again from time to time.

use std::collections::BTreeMap;

/// How many micro-batches of a step are under way together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MicroBatches {
    /// One, or two where that was measured to be faster.
    #[default]
    Auto,
    /// Always one.
    One,
    /// Always two, of steps with two rows or more.
    Two,
}

/// The share of a step that it has to wait for routed experts before halves are tried.
const WORTH: f64 = 0.25;
/// Halves have to take less than this share of the time of the whole.
const FASTER: f64 = 0.97;
/// Steps of a size before the slower way is tried again: at first, and after it has been slower again and again.
const FIRST_PAUSE: u32 = 32;
const LONGEST_PAUSE: u32 = 1024;

/// Measurements of steps, by their size in powers of two.
#[derive(Debug, Default)]
pub struct Halves {
    setting: MicroBatches,
    sizes: BTreeMap<u32, Size>,
}

/// What a step took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// Up to the residual of the last layer.
    pub seconds: f64,
    /// Of these, waited for routed experts.
    pub waited: f64,
}

#[derive(Debug)]
struct Size {
    whole: Option<Took>,
    halved: Option<f64>,
    /// Steps until the slower way is tried, and how many those are after each trial.
    left: u32,
    pause: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self { whole: None, halved: None, left: FIRST_PAUSE, pause: FIRST_PAUSE }
    }
}

impl Size {
    fn halves_are_faster(&self) -> bool {
        self.whole.zip(self.halved).is_some_and(|(whole, halved)| halved < FASTER * whole.seconds)
    }

    fn worth_trying(&self) -> bool {
        self.whole.is_some_and(|whole| whole.waited > WORTH * whole.seconds)
    }

    fn halve(&self) -> bool {
        if self.halves_are_faster() { self.left > 0 } else { self.left == 0 && self.worth_trying() }
    }

    fn observe(&mut self, halved: bool, took: Took) {
        let before = self.halves_are_faster();
        let trial = halved != before;
        // Trials are rare: the newest of them counts half, of other steps an eighth.
        let mean = |old: f64, new: f64| old + (new - old) * if trial { 0.5 } else { 0.125 };
        match (halved, &mut self.whole) {
            (true, _) => self.halved = Some(self.halved.map_or(took.seconds, |old| mean(old, took.seconds))),
            (false, Some(whole)) => {
                whole.seconds = mean(whole.seconds, took.seconds);
                whole.waited = mean(whole.waited, took.waited);
            }
            (false, none) => *none = Some(took),
        }
        self.left = self.left.saturating_sub(1);
        if self.halves_are_faster() != before {
            self.pause = FIRST_PAUSE;
            self.left = self.pause;
        } else if trial {
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.left = self.pause;
        }
    }
}

impl Halves {
    pub(crate) fn new(setting: MicroBatches) -> Self {
        Self { setting, sizes: BTreeMap::new() }
    }

    /// Whether the next step, of so many rows, is to run in two halves.
    pub fn halve(&self, rows: usize) -> bool {
        rows >= 2
            && match self.setting {
                MicroBatches::One => false,
                MicroBatches::Two => true,
                MicroBatches::Auto => self.sizes.get(&rows.ilog2()).is_some_and(Size::halve),
            }
    }

    /// A step took so long.
    pub fn observe(&mut self, rows: usize, halved: bool, took: Took) {
        if self.setting == MicroBatches::Auto && rows >= 2 && took.seconds.is_finite() {
            self.sizes.entry(rows.ilog2()).or_default().observe(halved, took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many steps ran in halves, when both ways take so long and a whole step waits so long.
    fn halved(steps: usize, whole: Took, halved: f64) -> usize {
        let mut halves = Halves::default();
        let run = |_: &usize| {
            let halve = halves.halve(48);
            let took = if halve { Took { seconds: halved, waited: 0.0 } } else { whole };
            halves.observe(48, halve, took);
            halve
        };
        (0..steps).filter(run).count()
    }

    #[test]
    fn what_is_faster_is_found() {
        let whole = Took { seconds: 0.010, waited: 0.006 };
        let count = halved(1000, whole, 0.007);
        assert!((900..1000).contains(&count), "{count} of 1000 steps");
    }

    #[test]
    fn what_is_slower_is_tried_less_and_less() {
        let whole = Took { seconds: 0.010, waited: 0.006 };
        let count = halved(10_000, whole, 0.012);
        assert!((5..=20).contains(&count), "{count} of 10000 steps");
    }

    #[test]
    fn where_little_is_waited_nothing_is_tried() {
        assert_eq!(halved(10_000, Took { seconds: 0.010, waited: 0.002 }, 0.001), 0);
    }

    #[test]
    fn a_way_that_has_become_slower_is_left() {
        let mut halves = Halves::default();
        let mut ways = Vec::new();
        for step in 0..8000 {
            let halve = halves.halve(2);
            // From some step on the network is fast.
            let (whole, waited, halved) = if step < 1000 { (0.010, 0.006, 0.007) } else { (0.006, 0.002, 0.0065) };
            let took = if halve { Took { seconds: halved, waited: 0.0 } } else { Took { seconds: whole, waited } };
            halves.observe(2, halve, took);
            ways.push(halve);
        }
        assert!(ways[900] && !ways[7999]);
    }

    #[test]
    fn settings_decide_where_there_is_something_to_halve() {
        assert!(!Halves::new(MicroBatches::Two).halve(1));
        assert!(Halves::new(MicroBatches::Two).halve(2));
        assert!(!Halves::new(MicroBatches::One).halve(512));
        assert!(!Halves::new(MicroBatches::Auto).halve(512), "nothing is known yet");
    }
}
