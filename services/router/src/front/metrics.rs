//! What the front counts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use conclave_serve::{Error, ErrorKind, metrics::Buckets};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// The front's metrics.
pub(crate) struct Metrics {
    requests: IntCounterVec,
    sequences: IntCounterVec,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) completion_tokens: IntCounter,
    pub(crate) active: IntGauge,
    pub(crate) failovers: IntCounter,
    first_token: Histogram,
    per_token: Histogram,
}

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Result<Self, Error> {
        Self::register(registry).map_err(|e| Error::new(ErrorKind::Internal, format!("metrics of the front: {e}")))
    }

    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let requests = Opts::new("conclave_requests_total", "API requests answered, by endpoint and status");
        let sequences = Opts::new("conclave_sequences_total", "Sequences ended, by outcome");
        let first_token = HistogramOpts::new("conclave_time_to_first_token_seconds", "From request to first token");
        let per_token =
            HistogramOpts::new("conclave_time_per_output_token_seconds", "Mean time between tokens of a sequence");
        let metrics = Self {
            requests: IntCounterVec::new(requests, &["endpoint", "status"])?,
            sequences: IntCounterVec::new(sequences, &["outcome"])?,
            prompt_tokens: IntCounter::new("conclave_prompt_tokens_total", "Prompt tokens of accepted requests")?,
            completion_tokens: IntCounter::new("conclave_completion_tokens_total", "Tokens generated for clients")?,
            active: IntGauge::new("conclave_active_sequences", "Sequences that run now")?,
            failovers: IntCounter::new("conclave_failovers_total", "Broken sequences handed to a replica again")?,
            first_token: Histogram::with_opts(first_token.buckets(Buckets::Token.bounds()))?,
            per_token: Histogram::with_opts(per_token.buckets(Buckets::Token.bounds()))?,
        };
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.sequences.clone()))?;
        registry.register(Box::new(metrics.prompt_tokens.clone()))?;
        registry.register(Box::new(metrics.completion_tokens.clone()))?;
        registry.register(Box::new(metrics.active.clone()))?;
        registry.register(Box::new(metrics.failovers.clone()))?;
        registry.register(Box::new(metrics.first_token.clone()))?;
        registry.register(Box::new(metrics.per_token.clone()))?;
        Ok(metrics)
    }

    /// Counts an answered request. For streams: when the answer begins.
    pub(crate) fn request(&self, endpoint: &str, status: &str) {
        self.requests.with_label_values(&[endpoint, status]).inc();
    }

    fn sequence(&self, outcome: &str) {
        self.sequences.with_label_values(&[outcome]).inc();
    }
}

/// Measures one sequence. Dropped before its end, it counts as cancelled.
pub(crate) struct Watch {
    metrics: Arc<Metrics>,
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u32,
    outcome: &'static str,
}

impl Watch {
    /// Starts; `begun` is when the request came.
    pub(crate) fn start(metrics: Arc<Metrics>, begun: Instant) -> Self {
        metrics.active.inc();
        Self { metrics, begun, first: None, last: begun, tokens: 0, outcome: "cancelled" }
    }

    /// A token arrived at `now`.
    pub(crate) fn token(&mut self, now: Instant) {
        if self.first.is_none() {
            self.first = Some(now);
            self.metrics.first_token.observe((now - self.begun).as_secs_f64());
        }
        self.last = now;
        self.tokens += 1;
        self.metrics.completion_tokens.inc();
    }

    /// The sequence ended so.
    pub(crate) fn end(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }

    fn mean_gap(&self) -> Option<Duration> {
        let gaps = self.tokens.checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some((self.last - self.first?) / gaps)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(gap) = self.mean_gap() {
            self.metrics.per_token.observe(gap.as_secs_f64());
        }
        self.metrics.active.dec();
        self.metrics.sequence(self.outcome);
    }
}
