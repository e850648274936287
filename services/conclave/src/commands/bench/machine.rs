//! The machine that is measured on: what it is, what it can do at most, and what processes take of it.

use std::fs;

use anyhow::{Context, Result, bail};
use conclave_kernels::{
    Isa, Pool,
    rates::{ReadProbe, multiply_add_rate},
};
use serde::Serialize;

use super::limits::Rates;

/// Passes over memory, and bursts of multiply-adds, at the beginning and at the end of a run.
const SAMPLES: usize = 15;
/// Bytes of a pass, unless memory is small: several times the largest caches.
const READ_BYTES: u64 = 1 << 30;

/// What the machine is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// As the processor calls itself.
    pub processor: String,
    /// Processors that this process may run on.
    pub cores: usize,
    /// Of the machine.
    pub memory_bytes: u64,
    /// Processes that ran or waited to in the minute before the run: others may have taken their part.
    pub load_before: Option<f64>,
    /// The same at its end, our own threads included.
    pub load_after: Option<f64>,
}

impl Machine {
    /// Reads `/proc`.
    pub fn read() -> Self {
        let line = |path: &str, name: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.lines().find_map(|line| Some(line.strip_prefix(name)?.trim_matches([' ', '\t', ':']).to_owned()))
        };
        Self {
            processor: line("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: line("/proc/meminfo", "MemTotal").as_deref().and_then(kibibytes).unwrap_or(0),
            load_before: load(),
            load_after: None,
        }
    }
}

/// Load average of the last minute.
pub fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// What the machine can do at most with `threads` threads, and the samples behind it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// Threads.
    pub threads: usize,
    /// Instruction set.
    pub isa: String,
    /// The best of the samples: a limit is not what others leave of it.
    pub rates: Rates,
    /// Bytes a second.
    pub read_samples: Vec<f64>,
    /// Operations a second.
    pub flops_samples: Vec<f64>,
}

impl Limits {
    /// Nothing measured yet.
    pub fn new(threads: usize, isa: Isa) -> Self {
        let rates = Rates { read: f64::MIN_POSITIVE, flops: f64::MIN_POSITIVE };
        Self { threads, isa: isa.to_string(), rates, read_samples: Vec::new(), flops_samples: Vec::new() }
    }

    /// Measures reads of memory and multiply-adds from registers. Blocks.
    ///
    /// # Errors
    /// When there is no memory, or the machine lacks the instruction set.
    pub fn probe(&mut self, machine: &Machine) -> Result<()> {
        let (pool, isa) = (Pool::new(self.threads)?, self.isa.parse()?);
        let memory = ReadProbe::new(READ_BYTES.min(machine.memory_bytes / 8).max(1 << 20) as usize)?;
        memory.rate(&pool);
        for _ in 0..SAMPLES {
            self.read_samples.push(memory.rate(&pool));
            self.flops_samples.push(2.0 * multiply_add_rate(&pool, isa)?);
        }
        self.rates.read = self.read_samples.iter().copied().fold(self.rates.read, f64::max);
        self.rates.flops = self.flops_samples.iter().copied().fold(self.rates.flops, f64::max);
        Ok(())
    }
}

/// Begins the peak of this process's memory anew: the limits, measured before, took some.
pub fn forget_peak_memory() {
    if let Err(error) = fs::write("/proc/self/clear_refs", "5") {
        tracing::warn!(%error, "the peak memory includes that of measuring the limits");
    }
}

/// Most memory that a process has had resident so far, in bytes.
///
/// # Errors
/// When there is no such process, or it cannot be looked at.
pub fn peak_memory(pid: Option<u32>) -> Result<u64> {
    let path = pid.map_or_else(|| "/proc/self/status".to_owned(), |pid| format!("/proc/{pid}/status"));
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    match status.lines().find_map(|line| line.strip_prefix("VmHWM:")).and_then(kibibytes) {
        Some(bytes) => Ok(bytes),
        None => bail!("{path}: found no VmHWM, expected a line with kB"),
    }
}

/// `  1234 kB` as bytes.
fn kibibytes(text: &str) -> Option<u64> {
    let number: u64 = text.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_peak() {
        let peak = peak_memory(None).unwrap();
        assert_eq!(peak_memory(Some(std::process::id())).unwrap() >> 24, peak >> 24);
        assert!(peak > 1 << 20, "{peak}");
        assert!(peak_memory(Some(u32::MAX)).unwrap_err().to_string().contains("/proc/4294967295/status"));
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(kibibytes("\t  2048 kB"), Some(2 << 20));
        assert_eq!((kibibytes("2048"), kibibytes("x kB")), (None, None));
    }

    #[test]
    fn the_machine_says_what_it_is() {
        let machine = Machine::read();
        assert!(machine.cores >= 1 && !machine.processor.is_empty(), "{machine:?}");
    }
}
