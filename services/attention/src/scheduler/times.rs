//! What steps take: measured, and foretold from what was measured.

use std::collections::BTreeMap;

use super::Load;

/// Steps after which a measurement counts half as much as a new one.
const FADING: f64 = 64.0;

/// Times of past steps. Similar steps (the same powers of two of rows and of positions attended to by each) are kept as
/// one, of which the newest counts half.
#[derive(Debug, Default)]
pub struct StepTimes {
    measured: BTreeMap<(u32, u32), Measured>,
    steps: u64,
}

/// Similar steps.
#[derive(Debug, Clone, Copy)]
struct Measured {
    rows: f64,
    pairs: f64,
    seconds: f64,
    /// When the last of them was.
    step: u64,
}

impl StepTimes {
    /// A step took so long.
    pub fn observe(&mut self, load: Load, seconds: f64) {
        if load.rows() == 0 || !(seconds > 0.0 && seconds.is_finite()) {
            return;
        }
        self.steps += 1;
        let new = Measured { rows: load.rows() as f64, pairs: load.pairs.max(1) as f64, seconds, step: self.steps };
        let kind = (load.rows().ilog2(), (load.pairs / load.rows()).max(1).ilog2());
        let old = *self.measured.entry(kind).or_insert(new);
        let half = |old: f64, new: f64| (old + new) / 2.0;
        let both = Measured {
            rows: half(old.rows, new.rows),
            pairs: half(old.pairs, new.pairs),
            seconds: half(old.seconds, new.seconds),
            step: self.steps,
        };
        self.measured.insert(kind, both);
    }

    /// Seconds that a step will take; `None` before anything was measured.
    ///
    /// A fixed part, a part for each row and one for each position attended to, none of them negative, fitted to what was
    /// measured (least squares of the relative error). Similar steps count most, and recent ones: so it holds where time
    /// does not grow in a straight line, too.
    pub fn seconds(&self, load: Load) -> Option<f64> {
        let (rows, pairs) = (load.rows().max(1) as f64, load.pairs.max(1) as f64);
        let mut fit = Fit::default();
        for measured in self.measured.values() {
            let (rows, pairs) = (measured.rows / rows, measured.pairs / pairs);
            let distance = rows.log2().powi(2) + (pairs / rows).log2().powi(2) / 4.0;
            let age = (self.steps - measured.step) as f64 / FADING;
            let weight = 1.0 / ((1.0 + age) * (1.0 + distance).powi(2) * measured.seconds.powi(2));
            fit.add([rows, 1.0, pairs], measured.seconds, weight);
        }
        // The step in question is one of each.
        (!self.measured.is_empty()).then(|| fit.solve().iter().sum())
    }
}

/// A weighted least-squares fit of three coefficients.
#[derive(Debug, Default)]
struct Fit {
    products: [[f64; 3]; 3],
    values: [f64; 3],
}

impl Fit {
    fn add(&mut self, terms: [f64; 3], value: f64, weight: f64) {
        for (row, term) in terms.iter().enumerate() {
            for (column, other) in terms.iter().enumerate() {
                self.products[row][column] += weight * term * other;
            }
            self.values[row] += weight * term * value;
        }
    }

    /// The best coefficients of which none is negative: those of the best choice of terms whose own solution has none.
    /// Where several are as good, that with the earliest terms.
    fn solve(&self) -> [f64; 3] {
        let choices = [[true, false, false], [true, true, false], [true, false, true], [true; 3]];
        let without_first = [[false, true, false], [false, true, true], [false, false, true]];
        let mut best = ([0.0; 3], 0.0);
        for chosen in choices.into_iter().chain(without_first) {
            let Some(found) = self.solve_with(chosen).filter(|found| found.iter().all(|value| *value >= 0.0)) else {
                continue;
            };
            let explained: f64 = found.iter().zip(&self.values).map(|(found, value)| found * value).sum();
            if explained > best.1 * (1.0 + 1e-9) {
                best = (found, explained);
            }
        }
        best.0
    }

    /// The best coefficients of the chosen terms (Gauss–Jordan); `None` where they do not differ enough.
    fn solve_with(&self, chosen: [bool; 3]) -> Option<[f64; 3]> {
        let (mut products, mut values) = (self.products, self.values);
        for pivot in (0..3).filter(|index| chosen[*index]) {
            let size = products[pivot][pivot];
            if size.is_nan() || size <= self.products[pivot][pivot] * 1e-9 {
                return None;
            }
            for row in (0..3).filter(|row| chosen[*row] && *row != pivot) {
                let factor = products[row][pivot] / size;
                let taken = products[pivot].map(|product| factor * product);
                products[row].iter_mut().zip(taken).for_each(|(product, taken)| *product -= taken);
                values[row] -= factor * values[pivot];
            }
        }
        let solution = |index: usize| if chosen[index] { values[index] / products[index][index] } else { 0.0 };
        Some([0, 1, 2].map(solution))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(rows: usize, context: usize) -> Load {
        Load { decode: 0, prefill: rows, pairs: rows * context }
    }

    fn close(found: Option<f64>, expected: f64, part: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() <= part * expected, "found {found}, expected {expected}");
    }

    #[test]
    fn nothing_is_foretold_from_nothing() {
        let mut times = StepTimes::default();
        assert_eq!(times.seconds(load(1, 1)), None);
        times.observe(load(0, 0), 1.0);
        times.observe(load(5, 5), f64::NAN);
        assert_eq!(times.seconds(load(1, 1)), None);
    }

    #[test]
    fn one_measurement_means_so_much_a_row() {
        let mut times = StepTimes::default();
        times.observe(load(10, 100), 2.0);
        close(times.seconds(load(10, 100)), 2.0, 1e-6);
        close(times.seconds(load(40, 100)), 8.0, 1e-6);
    }

    #[test]
    fn finds_the_three_parts() {
        let truth = |rows: f64, context: f64| 0.5 + 0.01 * rows + 2e-6 * rows * context;
        let mut times = StepTimes::default();
        for (rows, context) in [(1, 100), (8, 300), (32, 1000), (512, 256), (512, 3000)] {
            times.observe(load(rows, context), truth(rows as f64, context as f64));
        }
        close(times.seconds(load(100, 2000)), truth(100.0, 2000.0), 1e-3);
        close(times.seconds(load(400, 4000)), truth(400.0, 4000.0), 1e-3);
    }

    #[test]
    fn holds_where_reading_weights_hides_computing() {
        let truth = |rows: f64| (0.6f64).max(0.016 * rows);
        let mut times = StepTimes::default();
        for rows in [1, 4, 32, 64, 100, 256, 512] {
            times.observe(load(rows, 100), truth(rows as f64));
        }
        for rows in [1, 32, 64, 100, 256, 400, 512] {
            close(times.seconds(load(rows, 100)), truth(rows as f64), 0.15);
        }
    }

    #[test]
    fn long_decoding_does_not_forget_what_prompts_cost() {
        let mut times = StepTimes::default();
        times.observe(load(512, 256), 5.1);
        for step in 0..10_000 {
            times.observe(load(32, 100 + step / 10), 0.6);
        }
        let mixed = times.seconds(load(32 + 256, 600)).unwrap();
        assert!((2.0..4.0).contains(&mixed), "found {mixed}");
    }

    #[test]
    fn follows_a_machine_that_changes() {
        let mut times = StepTimes::default();
        (0..100).for_each(|_| times.observe(load(64, 100), 1.0));
        (0..5).for_each(|_| times.observe(load(64, 100), 3.0));
        close(times.seconds(load(64, 100)), 3.0, 0.05);
    }
}
