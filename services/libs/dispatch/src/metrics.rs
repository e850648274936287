//! What dispatch counts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use conclave_serve::metrics::Maker;
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, exponential_buckets,
};

use crate::link::Transport;
use crate::pair::{NoPair, Way};

/// Rows and sums go in the messages.
pub(crate) const MESSAGES: &str = "messages";

/// Metrics of one dispatcher.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) calls: IntCounterVec,
    pub(crate) seconds: Histogram,
    pub(crate) shard_seconds: HistogramVec,
    pub(crate) shard_rows: IntCounterVec,
    pub(crate) cell_rows: IntCounterVec,
    links: IntGaugeVec,
    /// Labels of each shard's link.
    linked: Arc<Mutex<HashMap<String, [&'static str; 3]>>>,
    pub(crate) batches: IntCounterVec,
    pub(crate) retries: IntCounterVec,
    pub(crate) hedges: IntCounter,
    pub(crate) groups_per_row: Histogram,
    pub(crate) groups_per_row_max: IntGauge,
    pub(crate) shards_per_call: Histogram,
    pub(crate) no_replica_waits: IntCounter,
}

impl Metrics {
    /// Makes the metrics and registers those whose names are free: a second dispatcher of a process counts unseen.
    pub(crate) fn new(registry: &Registry) -> Self {
        let maker = Maker::new(registry, "conclave_dispatch");
        let latency = || exponential_buckets(50e-6, 2.0, 18).unwrap_or_default();
        let counts = || (1..=16).map(f64::from).collect::<Vec<_>>();
        Self {
            calls: maker.counters("calls_total", "Layer calls by outcome.", &["outcome"]),
            seconds: maker.histogram("seconds", "Time of a layer call.", latency()),
            shard_seconds: maker.histograms("shard_seconds", "Time until a shard's answer.", latency(), &["shard"]),
            shard_rows: maker.counters("shard_rows_total", "Rows sent to a shard.", &["shard"]),
            cell_rows: maker.counters("cell_rows_total", "(row, expert) pairs sent to a cell.", &["cell"]),
            links: maker.gauges(
                "links",
                "How messages go to a shard, and its rows and sums: 1 beside its transport, their way, and why in no better one.",
                &["shard", "transport", "payload", "why"],
            ),
            linked: Arc::default(),
            batches: maker.counters("batches_total", "Batches sent, by the way of their rows.", &["payload"]),
            retries: maker.counters("retries_total", "Batches sent again, by reason.", &["reason"]),
            hedges: maker.counter("hedges_total", "Batches sent to a second replica because the first was slow."),
            groups_per_row: maker.histogram("groups_per_row", "Expert groups that a row of a layer touches.", counts()),
            groups_per_row_max: maker.gauge("groups_per_row_max", "Most expert groups that a row has touched."),
            shards_per_call: maker.histogram("shards_per_call", "Shards that took part in a layer call.", counts()),
            no_replica_waits: maker.counter("no_replica_waits_total", "Waits for a cell without a usable replica."),
        }
    }
}

impl Metrics {
    /// Messages go to a shard this way, rows and sums that way.
    pub(crate) fn link(&self, shard: &str, transport: Transport, pair: Result<Way, &NoPair>) {
        self.unlink(shard);
        let (payload, why) = pair.map_or_else(|why| (MESSAGES, why.name()), |way| (way.name(), ""));
        let labels = [transport.name(), payload, why];
        self.linked().insert(shard.to_owned(), labels);
        self.links.with_label_values(&[shard, labels[0], labels[1], labels[2]]).set(1);
    }

    /// There is no link to a shard any more.
    pub(crate) fn unlink(&self, shard: &str) {
        if let Some([transport, payload, why]) = self.linked().remove(shard) {
            // Fails only where there is no such series.
            let _ = self.links.remove_label_values(&[shard, transport, payload, why]);
        }
    }

    fn linked(&self) -> MutexGuard<'_, HashMap<String, [&'static str; 3]>> {
        self.linked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
