//! How work is cut into tasks. Cuts never go through a sum, so they change no bits.

use crate::pool::Pool;

/// Multiply-adds below which waking another thread costs more than it brings.
const GRAIN: usize = 1 << 16;
/// Tasks for each thread, so that one that is held up does not hold up all.
const TASKS_PER_THREAD: usize = 4;

/// Multiply-adds of one task where there are `total`.
pub(crate) fn work_of_one(pool: &Pool, total: usize) -> usize {
    total.div_ceil(pool.threads() * TASKS_PER_THREAD).max(GRAIN)
}

/// How many of `units` units of `work` multiply-adds each one task takes, at least one.
pub(crate) fn at_once(pool: &Pool, units: usize, work: usize) -> usize {
    work_of_one(pool, units.saturating_mul(work)).div_ceil(work.max(1))
}

/// Runs `unit(i)` for every `i` in `0..units`, together `work` multiply-adds: each is a task, or as many as are worth one.
pub(crate) fn run(pool: &Pool, units: usize, work: usize, unit: impl Fn(usize) + Sync) {
    let at_once = (GRAIN * units).div_ceil(work.max(1)).max(1);
    pool.run(units.div_ceil(at_once), |task| (task * at_once..units.min((task + 1) * at_once)).for_each(&unit));
}
