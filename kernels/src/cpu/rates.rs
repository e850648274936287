//! What this machine gives at most: reads of memory, and multiply-adds. Operations are measured against these.

use std::{
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use memmap2::MmapMut;

use super::{Isa, kernels};
use crate::{KernelError, Pool};

/// Tasks for each thread, so that one that is held up does not hold up all.
const TASKS_PER_THREAD: usize = 8;
/// Rounds of multiply-adds between two looks at the clock, and how long one task goes on.
const ROUNDS: usize = 4000;
const TASK: Duration = Duration::from_millis(4);

/// Memory on huge pages that is read from front to back.
pub struct ReadProbe {
    memory: MmapMut,
}

impl ReadProbe {
    /// Takes and fills `bytes` of memory; meant to be much larger than the caches.
    ///
    /// # Errors
    /// When the operating system gives no memory.
    pub fn new(bytes: usize) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Os { what: "map memory to be read", source };
        let mut memory = MmapMut::map_anon(bytes.max(1)).map_err(failed)?;
        #[cfg(target_os = "linux")]
        if let Err(error) = memory.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for the memory to be read");
        }
        memory.fill(1);
        Ok(Self { memory })
    }

    /// Bytes a second of one pass over all of it, on all threads of `pool`.
    pub fn rate(&self, pool: &Pool) -> f64 {
        let part = self.memory.len().div_ceil(pool.threads() * TASKS_PER_THREAD).next_multiple_of(64);
        let started = Instant::now();
        pool.run(self.memory.len().div_ceil(part), |task| {
            let end = self.memory.len().min((task + 1) * part);
            let mut sums = [0u64; 16];
            for line in self.memory[task * part..end].as_chunks::<128>().0 {
                for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                    *sum = sum.wrapping_add(u64::from_le_bytes(*bytes));
                }
            }
            black_box(sums);
        });
        self.memory.len() as f64 / started.elapsed().as_secs_f64()
    }
}

/// Multiply-adds a second from registers, on all threads of `pool`: some milliseconds of nothing else.
///
/// # Errors
/// When this machine lacks the instruction set.
pub fn multiply_add_rate(pool: &Pool, isa: Isa) -> Result<f64, KernelError> {
    let kernels = kernels::of(isa.check()?);
    let done = AtomicUsize::new(0);
    let started = Instant::now();
    pool.run(pool.threads() * TASKS_PER_THREAD, |_| {
        let started = Instant::now();
        let mut of_this_task = 0;
        while started.elapsed() < TASK {
            of_this_task += black_box(kernels.multiply_adds(ROUNDS));
        }
        done.fetch_add(of_this_task, Ordering::Relaxed);
    });
    Ok(done.into_inner() as f64 / started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_a_machine() {
        let pool = Pool::new(2).unwrap();
        let read = ReadProbe::new((1 << 20) + 1).unwrap().rate(&pool);
        assert!(read > 1e8 && read < 1e13, "{read} bytes a second");
        for isa in Isa::available() {
            let rate = multiply_add_rate(&pool, isa).unwrap();
            assert!(rate > 1e8 && rate < 1e13, "{isa}: {rate} multiply-adds a second");
        }
    }
}
