//! Figures of the engine.

use conclave_serve::metrics::Buckets;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntGauge, Registry};

use crate::scheduler::Load;

/// The engine's metrics.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) blocks_used: IntGauge,
    pub(crate) blocks_total: IntGauge,
    pub(crate) blocks_idle: IntGauge,
    pub(crate) blocks_evicted: IntCounter,
    step_rows: HistogramVec,
    step_seconds: HistogramVec,
    chunk_rows: IntGauge,
    pub(crate) expert_wait_seconds: Histogram,
    pub(crate) queue_seconds: Histogram,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) cached_tokens: IntCounter,
    pub(crate) generated_tokens: IntCounter,
    pub(crate) preemptions: IntCounter,
    pub(crate) cut_steps: IntCounter,
    pub(crate) halved_steps: IntCounter,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// When a name is taken.
    pub(crate) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help| register(registry, IntGauge::new(name, help)?);
        let counter = |name, help| register(registry, IntCounter::new(name, help)?);
        let histogram = |name: &str, help: &str, buckets: Buckets| {
            register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.bounds()))?)
        };
        let by_kind = |name: &str, help: &str, buckets: Buckets| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.bounds());
            register(registry, HistogramVec::new(opts, &["kind"])?)
        };
        Ok(Self {
            running: gauge("conclave_attention_running", "Sequences that hold cache blocks.")?,
            waiting: gauge("conclave_attention_waiting", "Sequences that wait for cache blocks.")?,
            blocks_used: gauge("conclave_attention_cache_blocks_used", "Blocks of the latent cache in use.")?,
            blocks_total: gauge("conclave_attention_cache_blocks", "Blocks of the latent cache.")?,
            blocks_idle: gauge(
                "conclave_attention_cache_blocks_idle",
                "Blocks that nobody uses, kept for their prefix.",
            )?,
            blocks_evicted: counter(
                "conclave_attention_cache_blocks_evicted_total",
                "Blocks that were kept for their prefix and given up for others.",
            )?,
            step_rows: by_kind(
                "conclave_attention_step_rows",
                "Rows of a step, by what they are for: decode or prefill.",
                Buckets::Count,
            )?,
            step_seconds: by_kind(
                "conclave_attention_step_seconds",
                "Duration of a step, by what it had rows for: decode, prefill, or both.",
                Buckets::Token,
            )?,
            chunk_rows: gauge(
                "conclave_attention_chunk_rows",
                "Rows of prompts that the last step with both prompts and sequences that decode took along.",
            )?,
            expert_wait_seconds: histogram(
                "conclave_attention_expert_wait_seconds",
                "Waiting for the routed experts of a layer after the shared experts were computed.",
                Buckets::Hop,
            )?,
            queue_seconds: histogram(
                "conclave_attention_queue_seconds",
                "From a request's arrival to its first step.",
                Buckets::Request,
            )?,
            prompt_tokens: counter("conclave_attention_prompt_tokens_total", "Prompt tokens of admitted requests.")?,
            cached_tokens: counter(
                "conclave_attention_cached_prompt_tokens_total",
                "Prompt tokens of admitted requests that were in the latent cache.",
            )?,
            generated_tokens: counter("conclave_attention_generated_tokens_total", "Tokens sampled.")?,
            preemptions: counter("conclave_attention_preemptions_total", "Sequences that lost their cache blocks.")?,
            halved_steps: counter(
                "conclave_attention_halved_steps_total",
                "Steps that ran as two micro-batches, one computing while the other was with the routed experts.",
            )?,
            cut_steps: counter("conclave_attention_cut_steps_total", "Steps given up because experts did not answer.")?,
        })
    }
}

impl Metrics {
    /// A step has been planned.
    pub(crate) fn begin_step(&self, load: Load) {
        self.step_rows.with_label_values(&["decode"]).observe(load.decode as f64);
        self.step_rows.with_label_values(&["prefill"]).observe(load.prefill as f64);
        if load.decode > 0 && load.prefill > 0 {
            self.chunk_rows.set(load.prefill as i64);
        }
    }

    /// A step has been computed and delivered.
    pub(crate) fn end_step(&self, load: Load, seconds: f64) {
        let kind = match (load.decode, load.prefill) {
            (_, 0) => "decode",
            (0, _) => "prefill",
            _ => "both",
        };
        self.step_seconds.with_label_values(&[kind]).observe(seconds);
    }
}

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: C) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
