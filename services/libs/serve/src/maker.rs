//! Makes the metrics of one service.

use prometheus::{
    CounterVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, core::Collector,
};

/// Makes metrics under a common prefix and registers those whose names are free: of several services in one process the
/// later ones count unseen.
///
/// Names and labels are constants of the caller: one that Prometheus does not allow is a bug and panics.
#[derive(Debug, Clone, Copy)]
pub struct Maker<'a> {
    registry: &'a Registry,
    prefix: &'static str,
}

impl<'a> Maker<'a> {
    /// Metrics named `prefix_…`.
    pub fn new(registry: &'a Registry, prefix: &'static str) -> Self {
        Self { registry, prefix }
    }

    /// A count.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    /// Counts by label.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(self.opts(name, help), labels))
    }

    /// Sums of fractions by label.
    pub fn sums(&self, name: &str, help: &str, labels: &[&str]) -> CounterVec {
        self.add(CounterVec::new(self.opts(name, help), labels))
    }

    /// A figure that goes up and down.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    /// Such figures by label.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(self.opts(name, help), labels))
    }

    /// A distribution over ascending upper bounds.
    pub fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::from(self.opts(name, help)).buckets(buckets)))
    }

    /// Distributions by label.
    pub fn histograms(&self, name: &str, help: &str, buckets: Vec<f64>, labels: &[&str]) -> HistogramVec {
        self.add(HistogramVec::new(HistogramOpts::from(self.opts(name, help)).buckets(buckets), labels))
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("{}_{name}", self.prefix), help)
    }

    fn add<M: Collector + Clone + 'static>(&self, made: prometheus::Result<M>) -> M {
        let metric = made.expect("metric names and labels are constants");
        if let Err(error) = self.registry.register(Box::new(metric.clone())) {
            tracing::debug!(%error, "metric not registered");
        }
        metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::render;

    #[test]
    fn the_first_of_a_name_is_shown_and_later_ones_count_unseen() {
        let registry = Registry::new();
        let (first, second) = (Maker::new(&registry, "conclave_test"), Maker::new(&registry, "conclave_test"));
        let rows = first.counters("rows_total", "Rows.", &["shard"]);
        rows.with_label_values(&["a"]).inc_by(3);
        second.counters("rows_total", "Rows.", &["shard"]).with_label_values(&["a"]).inc_by(9);
        first.histogram("seconds", "Time.", vec![1.0, 2.0]).observe(1.5);
        let text = render(&registry);
        assert!(text.contains("conclave_test_rows_total{shard=\"a\"} 3\n"), "{text}");
        assert!(text.contains("conclave_test_seconds_bucket{le=\"2\"} 1\n"), "{text}");
    }
}
