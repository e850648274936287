//! Prometheus helpers around an explicit registry; there is no global one.

use prometheus::{IntGaugeVec, Opts, Registry, TextEncoder};

pub use crate::maker::Maker;
use crate::process::ProcessCollector;
pub use crate::startup::Startup;

/// Of what [`render`] returns.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Everything in the registry in Prometheus' text format.
pub fn render(registry: &Registry) -> String {
    TextEncoder::new()
        .encode_to_string(&registry.gather())
        .unwrap_or_else(|error| format!("# metrics cannot be written: {error}\n"))
}

/// Registers `conclave_build_info` (always 1, labels `version` and `service`) and the process's own figures under the
/// names that Prometheus' clients share: `process_resident_memory_bytes`, `process_cpu_seconds_total`,
/// `process_start_time_seconds`, `process_threads`, `process_open_fds`.
///
/// # Errors
/// When they are registered already.
pub fn register_process(registry: &Registry, service: &str) -> prometheus::Result<()> {
    let opts = Opts::new("conclave_build_info", "Version of the running binary, always 1.");
    let info = IntGaugeVec::new(opts, &["version", "service"])?;
    info.with_label_values(&[env!("CARGO_PKG_VERSION"), service]).set(1);
    registry.register(Box::new(info))?;
    registry.register(Box::new(ProcessCollector::new()?))
}

/// Histogram bounds for what the services measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buckets {
    /// One hop or one layer: 50 µs to 1.6 s, doubling. Seconds.
    Hop,
    /// Time to a token: 1 ms to 33 s, doubling. Seconds.
    Token,
    /// A whole request: 10 ms to 11 min, doubling. Seconds.
    Request,
    /// Counts of rows, tokens, batches: 1 to 16384, doubling.
    Count,
}

impl Buckets {
    /// The upper bounds, ascending, without +Inf.
    pub fn bounds(self) -> Vec<f64> {
        let (start, steps) = match self {
            Self::Hop => (50e-6, 16),
            Self::Token => (1e-3, 16),
            Self::Request => (10e-3, 17),
            Self::Count => (1.0, 15),
        };
        (0..steps).map(|step| start * f64::from(1_u32 << step)).collect()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{Histogram, HistogramOpts};

    use super::*;

    #[test]
    fn buckets_make_valid_histograms_of_the_promised_range() {
        for (buckets, last) in
            [(Buckets::Hop, 1.6384), (Buckets::Token, 32.768), (Buckets::Request, 655.36), (Buckets::Count, 16384.0)]
        {
            let bounds = buckets.bounds();
            assert!((bounds.last().expect("not empty") - last).abs() < 1e-9, "{buckets:?}: {bounds:?}");
            let opts = HistogramOpts::new("conclave_test_seconds", "A test.").buckets(bounds);
            assert!(Histogram::with_opts(opts).is_ok(), "{buckets:?} ascends");
        }
    }

    #[test]
    fn the_process_shows_its_own_figures() {
        let registry = Registry::new();
        register_process(&registry, "test").expect("a fresh registry");
        let text = render(&registry);
        let version = env!("CARGO_PKG_VERSION");
        assert!(text.contains(&format!("conclave_build_info{{service=\"test\",version=\"{version}\"}} 1\n")), "{text}");
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).expect("the metric is there");
            line.rsplit(' ').next().expect("a value").parse().expect("a number")
        };
        let resident = value("process_resident_memory_bytes");
        assert!(resident > 500_000.0 && resident < 1e12, "{resident}");
        assert!(value("process_start_time_seconds") > 1.6e9, "after 2020");
        assert!(value("process_threads") >= 1.0);
        assert!(value("process_open_fds") >= 1.0);
        assert!(register_process(&registry, "test").is_err(), "twice is refused");
    }
}
