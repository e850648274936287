//! The machine that is measured on: what it is, what it can do at most, and what processes take of it.

use std::{
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, bail};
use conclave_kernels::RateProbe;
use serde::Serialize;

use super::limits::Rates;
use crate::process::blocking;

/// Passes over memory, and bursts of multiply-adds, the best of which counts.
const PASSES: usize = 3;

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

/// What the machine's processor, or its GPU, can do at most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// What of the machine.
    pub of: String,
    /// From the beginning of the run to its end.
    pub samples: Vec<Rates>,
}

impl Limits {
    /// The best that was seen: a limit is not what others leave of it.
    pub fn best(&self) -> Rates {
        let best = |rate: fn(&Rates) -> f64| self.samples.iter().map(rate).fold(f64::MIN_POSITIVE, f64::max);
        Rates { read: best(|rates| rates.read), flops: best(|rates| rates.flops) }
    }
}

/// Measures the limits of the machine, again and again.
#[derive(Clone)]
pub struct Probe(Arc<Probing>);

struct Probing {
    device: Box<dyn RateProbe>,
    limits: Mutex<Limits>,
}

impl Probe {
    /// Measures with a probe of the device that computes. Blocks.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: Box<dyn RateProbe>) -> Result<Self> {
        let limits = Mutex::new(Limits { of: device.about(), samples: Vec::new() });
        device.read_rate()?;
        Ok(Self(Arc::new(Probing { device, limits })))
    }

    /// What the machine gives now.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn rates(&self) -> Result<Rates> {
        let probing = self.0.clone();
        blocking("measure the limits of this machine", move || probing.rates()).await
    }

    /// All that was found so far.
    pub fn limits(&self) -> Limits {
        self.0.lock().clone()
    }

    /// Of this process's memory that it holds.
    pub fn bytes(&self) -> u64 {
        self.0.device.host_bytes()
    }
}

impl Probing {
    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rates(&self) -> Result<Rates> {
        let mut rates = Rates { read: f64::MIN_POSITIVE, flops: f64::MIN_POSITIVE };
        for _ in 0..PASSES {
            rates.read = rates.read.max(self.device.read_rate()?);
            rates.flops = rates.flops.max(2.0 * self.device.multiply_add_rate()?);
        }
        self.lock().samples.push(rates);
        Ok(rates)
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
    use conclave_kernels::KernelError;

    use super::*;

    /// A device with rates of its own, in ones.
    struct Fixed;

    impl RateProbe for Fixed {
        fn about(&self) -> String {
            "a device".to_owned()
        }

        fn read_rate(&self) -> Result<f64, KernelError> {
            Ok(3.0)
        }

        fn multiply_add_rate(&self) -> Result<f64, KernelError> {
            Ok(5.0)
        }

        fn host_bytes(&self) -> u64 {
            7
        }
    }

    #[tokio::test]
    async fn limits_are_those_of_the_device() {
        let probe = Probe::new(Box::new(Fixed)).unwrap();
        let rates = Rates { read: 3.0, flops: 10.0 };
        assert_eq!(probe.rates().await.unwrap(), rates);
        assert_eq!(probe.limits(), Limits { of: "a device".to_owned(), samples: vec![rates] });
        assert_eq!(probe.bytes(), 7);
    }

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
