//! What this machine's processor gives at most.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use memmap2::MmapMut;

use super::{Isa, kernels};
use crate::{KernelError, Pool, RateProbe};

/// Tasks for each thread, so that one that is held up does not hold up all.
const TASKS_PER_THREAD: usize = 8;
/// Rounds of multiply-adds between two looks at the clock, and how long one task goes on.
const ROUNDS: usize = 4000;
const TASK: Duration = Duration::from_millis(4);

/// Reads memory on huge pages from front to back, and multiplies and adds from registers, on all threads of a pool.
pub struct CpuRates {
    pool: Arc<Pool>,
    isa: Isa,
    memory: MmapMut,
}

impl CpuRates {
    /// Bytes that are read: several times the largest caches.
    pub const BYTES: usize = 512 << 20;

    /// Takes and fills `bytes` of memory.
    ///
    /// # Errors
    /// When this machine lacks the instruction set, or the operating system gives no memory.
    pub fn new(pool: Arc<Pool>, isa: Isa, bytes: usize) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Os { what: "map memory to be read", source };
        let mut memory = MmapMut::map_anon(bytes.max(1)).map_err(failed)?;
        #[cfg(target_os = "linux")]
        if let Err(error) = memory.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for the memory to be read");
        }
        memory.fill(1);
        Ok(Self { pool, isa: isa.check()?, memory })
    }
}

impl RateProbe for CpuRates {
    fn about(&self) -> String {
        format!("{} threads, {}", self.pool.threads(), self.isa)
    }

    fn read_rate(&self) -> Result<f64, KernelError> {
        let part = self.memory.len().div_ceil(self.pool.threads() * TASKS_PER_THREAD).next_multiple_of(64);
        let started = Instant::now();
        self.pool.run(self.memory.len().div_ceil(part), |task| {
            let end = self.memory.len().min((task + 1) * part);
            let mut sums = [0u64; 16];
            for line in self.memory[task * part..end].as_chunks::<128>().0 {
                for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                    *sum = sum.wrapping_add(u64::from_le_bytes(*bytes));
                }
            }
            black_box(sums);
        });
        Ok(self.memory.len() as f64 / started.elapsed().as_secs_f64())
    }

    fn multiply_add_rate(&self) -> Result<f64, KernelError> {
        let kernels = kernels::of(self.isa);
        let done = AtomicUsize::new(0);
        let started = Instant::now();
        self.pool.run(self.pool.threads() * TASKS_PER_THREAD, |_| {
            let started = Instant::now();
            let mut of_this_task = 0;
            while started.elapsed() < TASK {
                of_this_task += black_box(kernels.multiply_adds(ROUNDS));
            }
            done.fetch_add(of_this_task, Ordering::Relaxed);
        });
        Ok(done.into_inner() as f64 / started.elapsed().as_secs_f64())
    }

    fn host_bytes(&self) -> u64 {
        self.memory.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_a_machine() {
        let pool = Pool::new(2).unwrap();
        for isa in Isa::available() {
            let rates = CpuRates::new(pool.clone(), isa, (1 << 20) + 1).unwrap();
            let (read, multiply_add) = (rates.read_rate().unwrap(), rates.multiply_add_rate().unwrap());
            assert!(read > 1e8 && read < 1e13, "{read} bytes a second");
            assert!(multiply_add > 1e8 && multiply_add < 1e13, "{isa}: {multiply_add} multiply-adds a second");
            assert_eq!((rates.about(), rates.host_bytes()), (format!("2 threads, {isa}"), (1 << 20) + 1));
        }
    }
}
