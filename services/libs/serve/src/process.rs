//! What the process takes of its machine, read from `/proc/self` when it is asked for.

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge};

/// Ticks per second of the times in `/proc/*/stat`: a constant of Linux' user-space interface.
const USER_HZ: f64 = 100.0;

pub(crate) struct ProcessCollector {
    resident: Gauge,
    threads: Gauge,
    open_fds: Gauge,
    start: Gauge,
    cpu: Counter,
    /// What `cpu` holds: two scrapes at once must not count the same seconds twice.
    counted: Mutex<f64>,
}

impl ProcessCollector {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let start = Gauge::new("process_start_time_seconds", "When the process began to serve, since the Unix epoch.")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        start.set(now.as_secs_f64());
        Ok(Self {
            resident: Gauge::new("process_resident_memory_bytes", "Resident memory.")?,
            threads: Gauge::new("process_threads", "Threads.")?,
            open_fds: Gauge::new("process_open_fds", "Open file descriptors.")?,
            start,
            cpu: Counter::new("process_cpu_seconds_total", "User and system time.")?,
            counted: Mutex::new(0.0),
        })
    }

    /// Figures that cannot be read (no `/proc`) stay as they were.
    fn refresh(&self) {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        if let Some(kilobytes) = field(&status, "VmRSS:") {
            self.resident.set(kilobytes * 1024.0);
        }
        if let Some(threads) = field(&status, "Threads:") {
            self.threads.set(threads);
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            self.open_fds.set(entries.count() as f64);
        }
        if let Some(seconds) = fs::read_to_string("/proc/self/stat").ok().and_then(|stat| cpu_seconds(&stat)) {
            let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            self.cpu.inc_by((seconds - *counted).max(0.0));
            *counted = counted.max(seconds);
        }
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = [&self.resident, &self.threads, &self.open_fds, &self.start];
        gauges.into_iter().flat_map(Collector::desc).chain(self.cpu.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.refresh();
        let gauges = [&self.resident, &self.threads, &self.open_fds, &self.start];
        gauges.into_iter().flat_map(Collector::collect).chain(self.cpu.collect()).collect()
    }
}

/// The number behind `name` in `/proc/self/status`.
fn field(status: &str, name: &str) -> Option<f64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// User plus system time from `/proc/self/stat`; the command in parentheses may hold blanks.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / USER_HZ)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_any_command_name() {
        let stat = "42 (a b) c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 8 0 100 1000 10";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        assert_eq!(cpu_seconds("garbage"), None);
    }

    #[test]
    fn status_fields_are_numbers() {
        let status = "Name:\tx\nVmRSS:\t  2048 kB\nThreads:\t3\n";
        assert_eq!(field(status, "VmRSS:"), Some(2048.0));
        assert_eq!(field(status, "Threads:"), Some(3.0));
        assert_eq!(field(status, "VmSwap:"), None);
    }
}
