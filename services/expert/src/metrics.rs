//! What an expert process counts.

use conclave_serve::metrics::Maker;
use prometheus::{
    CounterVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, exponential_buckets,
};

/// Metrics of one expert service.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) cell_rows: IntCounterVec,
    pub(crate) cell_busy: CounterVec,
    pub(crate) cell_bytes: IntGaugeVec,
    pub(crate) merged_rows: Histogram,
    pub(crate) merged_batches: Histogram,
    pub(crate) queue_rows: IntGauge,
    pub(crate) queue_seconds: Histogram,
    pub(crate) busy_seconds: Histogram,
    pub(crate) refused: IntCounterVec,
    pub(crate) dropped: IntCounter,
    pub(crate) pairs: IntGaugeVec,
}

impl Metrics {
    /// Makes the metrics and registers those whose names are free: with several services in one process the later ones
    /// count unseen.
    pub(crate) fn new(registry: &Registry) -> Self {
        let maker = Maker::new(registry, "conclave_expert");
        let seconds = || exponential_buckets(50e-6, 2.0, 18).unwrap_or_default();
        let counts = || exponential_buckets(1.0, 2.0, 13).unwrap_or_default();
        let cell = &["cell"][..];
        Self {
            cell_rows: maker.counters("cell_rows_total", "(row, expert) pairs computed.", cell),
            cell_busy: maker.sums("cell_busy_seconds_total", "Time in the grouped FFN.", cell),
            cell_bytes: maker.gauges("cell_bytes", "Weights resident.", cell),
            merged_rows: maker.histogram("merged_rows", "Rows of one grouped FFN.", counts()),
            merged_batches: maker.histogram("merged_batches", "Batches merged into one grouped FFN.", counts()),
            queue_rows: maker.gauge("queue_rows", "Rows that wait."),
            queue_seconds: maker.histogram("queue_seconds", "Wait of a batch before its grouped FFN.", seconds()),
            busy_seconds: maker.histogram("busy_seconds", "Time of one grouped FFN.", seconds()),
            refused: maker.counters("refused_total", "Batches refused, by reason.", &["reason"]),
            dropped: maker.counter("dropped_total", "Batches whose caller went away."),
            pairs: maker.gauges(
                "pairs",
                "Pairs of device memory: open, or kept since their callers may look there.",
                &["state"],
            ),
        }
    }
}
