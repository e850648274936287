//! How many rows of prompts go along with sequences that decode.

use super::prompts::QUANTUM;
use super::{Limits, Plan, Queue, StepTimes, plan};

/// Rows of prompts that a step may always have, however long it takes: prompts advance.
pub const FLOOR: usize = 64;

/// Plans one step. While somebody decodes, its next token waits for the step's end: then the step has as many rows of
/// prompts as are foretold to keep it within `target` seconds, never fewer than [`FLOOR`], and only as many as that
/// before anything was measured. Where nobody decodes, all that the limits allow.
pub fn plan_within(limits: &Limits, times: &StepTimes, target: f64, queue: Queue<'_>) -> Plan {
    let fits = |plan: &Plan| times.seconds(plan.load(queue)).is_some_and(|seconds| seconds <= target);
    let widest = plan(limits, limits.step_tokens, queue);
    let load = widest.load(queue);
    if load.decode == 0 || load.prefill <= FLOOR || fits(&widest) {
        return widest;
    }
    let of_quanta = |quanta: usize| plan(limits, FLOOR + quanta * QUANTUM, queue);
    let (mut fitting, mut too_many) = (0, (load.prefill - FLOOR).div_ceil(QUANTUM));
    while too_many - fitting > 1 {
        let middle = fitting.midpoint(too_many);
        *if fits(&of_quanta(middle)) { &mut fitting } else { &mut too_many } = middle;
    }
    of_quanta(fitting)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Demand, Load};
    use super::*;

    const LIMITS: Limits = Limits { step_tokens: 512, prefill_chunk: 512, max_running: 64, block: 64 };

    fn at(computed: usize, target: usize) -> Demand {
        Demand { target, computed, blocks: computed.div_ceil(64), idle: 0 }
    }

    /// `streams` that decode beside a prompt.
    fn busy(streams: usize) -> Vec<Demand> {
        (0..streams).map(|_| at(100, 101)).chain([at(0, 4096)]).collect()
    }

    fn queue(running: &[Demand]) -> Queue<'_> {
        Queue { running, waiting: &[], free: 10_000 }
    }

    /// A machine that needs `fixed` seconds for a step and `row` for each row.
    fn times(fixed: f64, row: f64) -> StepTimes {
        let mut times = StepTimes::default();
        for rows in [1, 8, 32, 128, 512] {
            let load = Load { decode: 0, prefill: rows, pairs: rows * 100 };
            times.observe(load, fixed + row * rows as f64);
        }
        times
    }

    fn chunk(times: &StepTimes, target: f64, running: &[Demand]) -> usize {
        plan_within(&LIMITS, times, target, queue(running)).load(queue(running)).prefill
    }

    #[test]
    fn a_fast_machine_takes_whole_chunks_along() {
        assert_eq!(chunk(&times(0.005, 1e-4), 0.2, &busy(32)), 480);
    }

    #[test]
    fn a_slow_one_takes_what_fits() {
        let rows = chunk(&times(0.1, 1e-3), 0.3, &busy(32));
        assert!((150..=168).contains(&rows), "32 + 168 rows take 0.3 s: found {rows}");
        assert_eq!(rows % QUANTUM, 0);
    }

    #[test]
    fn never_less_than_the_floor() {
        assert_eq!(chunk(&times(0.6, 0.016), 0.2, &busy(32)), FLOOR);
        assert_eq!(chunk(&StepTimes::default(), 0.2, &busy(32)), FLOOR);
        let short = [at(100, 101), at(0, 40)];
        assert_eq!(chunk(&times(0.6, 0.016), 0.2, &short), 40);
    }

    #[test]
    fn where_nobody_decodes_the_whole_step_is_for_prompts() {
        assert_eq!(chunk(&times(0.6, 0.016), 0.2, &busy(0)), 512);
        assert_eq!(chunk(&StepTimes::default(), 0.2, &busy(0)), 512);
    }

    /// Seconds that a step really takes: reading weights hides some computing, long contexts cost.
    fn really(load: Load, row: f64) -> f64 {
        (40.0 * row).max(row * load.rows() as f64) + row * load.pairs as f64 / 4000.0
    }

    proptest! {
        /// Whatever decodes and arrives on a machine of whatever speed: every sequence that decodes has its row in every
        /// step, the oldest prompt advances in every step, steps keep within the target once they have been measured (or
        /// have no more rows of prompts than the floor), and every prompt ends.
        #[test]
        fn steps_keep_their_time_and_prompts_advance(
            streams in 1usize..32,
            prompts in prop::collection::vec(1usize..3000, 1..8),
            row in 1e-4f64..2e-2,
            target in 0.05f64..2.0,
        ) {
            let mut running: Vec<Demand> = (0..streams).map(|_| at(200, 201)).collect();
            running.extend(prompts.iter().map(|prompt| at(0, *prompt)));
            let mut times = StepTimes::default();
            let mut late = 0;
            for step in 0.. {
                let prompt = |sequence: &Demand| sequence.missing() > 1;
                let Some(oldest) = running.iter().position(prompt) else { break };
                prop_assert!(step < 1000, "does not end");
                let plan = plan_within(&LIMITS, &times, target, queue(&running));
                let load = plan.load(queue(&running));
                let decoding = running.iter().filter(|sequence| sequence.decodes()).count();
                prop_assert_eq!(load.decode, decoding);
                prop_assert!(plan.rows[oldest] > 0 && load.rows() <= LIMITS.step_tokens);
                let seconds = really(load, row);
                late += usize::from(load.prefill > FLOOR && seconds > 1.3 * target);
                times.observe(load, seconds);
                for (sequence, rows) in running.iter_mut().zip(&plan.rows) {
                    let computed = sequence.computed + rows;
                    *sequence = at(computed, sequence.target.max(computed + 1));
                }
            }
            prop_assert!(late <= 3, "{late} steps took much longer than they may");
        }
    }
}
