//! A tiny checkpoint with random weights, routed experts that are a fixed function of each row, and a service on both.

pub(crate) mod checkpoint;
pub(crate) mod experts;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_attention::trunk::{DeviceTrunk, TrunkSize};
use conclave_attention::{AttentionConfig, AttentionService, CacheSize, TokenStream};
use conclave_kernels::{Cpu, Device, Pool, Reference};
use conclave_model::{Checkpoint, Progress};
use conclave_proto::InstanceId;
use conclave_proto::v1::{Sampling, ScoredToken, SequenceFinished, SequenceRequest, token_event::Event};
use conclave_serve::Error;
use futures::StreamExt;
use prometheus::Registry;

pub(crate) use checkpoint::{MOE, Shape};
pub(crate) use experts::{Behaviour, Experts};

/// Longer than anything here takes; only reached when something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running service with what it stands on.
pub(crate) struct Fixture {
    pub(crate) service: Arc<AttentionService>,
    pub(crate) experts: Arc<Experts>,
    pub(crate) registry: Registry,
    pub(crate) checkpoint: Arc<Checkpoint>,
}

pub(crate) fn reference() -> Arc<Reference> {
    Arc::new(Reference::new(Pool::new(2).expect("threads")))
}

pub(crate) fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(Pool::new(2).expect("threads"), None).expect("some instruction set"))
}

pub(crate) fn config() -> AttentionConfig {
    AttentionConfig { cache: CacheSize::Blocks(64), ..AttentionConfig::new(InstanceId("attention-1".into())) }
}

/// A service on the tiny model with routed experts, its configuration changed by `change`.
pub(crate) fn start(change: impl FnOnce(&mut AttentionConfig)) -> Fixture {
    start_shape(&MOE, change)
}

pub(crate) fn start_shape(shape: &Shape, change: impl FnOnce(&mut AttentionConfig)) -> Fixture {
    start_on(reference(), shape, change)
}

pub(crate) fn start_on<D: Device>(device: Arc<D>, shape: &Shape, change: impl FnOnce(&mut AttentionConfig)) -> Fixture {
    let (_dir, checkpoint) = checkpoint::open(shape);
    let (experts, registry) = (Experts::new(), Registry::new());
    let mut config = config();
    change(&mut config);
    let link = Arc::clone(&experts);
    let service = AttentionService::start(config, device, Arc::clone(&checkpoint), link, &registry).expect("starts");
    Fixture { service, experts, registry, checkpoint }
}

/// The trunk alone.
pub(crate) fn trunk<D: Device>(device: Arc<D>, checkpoint: &Checkpoint, context_limit: usize) -> DeviceTrunk<D> {
    let size = TrunkSize { blocks: context_limit.div_ceil(64) as u32, context_limit, exact: true };
    DeviceTrunk::load(device, checkpoint, size, &Progress::default()).expect("loads")
}

/// A prompt of `len` ids, different for each `seed`.
pub(crate) fn prompt(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64)
        .map(|i| ((i * i * 7 + i * (seed + 3) * 31 + seed * 101) % checkpoint::VOCAB as u64) as u32)
        .collect()
}

/// Greedy, ten tokens, with logprobs.
pub(crate) fn request(tokens: Vec<u32>) -> SequenceRequest {
    SequenceRequest {
        request_id: format!("r{}", tokens.len()),
        prompt_len: tokens.len() as u32,
        tokens,
        sampling: Some(Sampling { seed: 11, top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() }),
        max_tokens: 10,
        logprobs: Some(3),
        ..SequenceRequest::default()
    }
}

/// As [`request`], with every sampling setting in use.
pub(crate) fn sampled(tokens: Vec<u32>, seed: u64) -> SequenceRequest {
    let sampling = Sampling {
        seed,
        temperature: 0.9,
        top_k: 100,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: HashMap::from([(5, 1.5), (17, -2.0)]),
        min_tokens: 2,
    };
    SequenceRequest { sampling: Some(sampling), ..request(tokens) }
}

/// All that a stream gave. Equal whatever was read from the cache: that decides nothing.
#[derive(Debug, Default, Clone)]
pub(crate) struct Answer {
    pub(crate) scores: Vec<ScoredToken>,
    pub(crate) tokens: Vec<ScoredToken>,
    pub(crate) finished: Option<SequenceFinished>,
    pub(crate) error: Option<Error>,
    /// Prompt tokens that were in the cache.
    pub(crate) cached: u32,
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        (&self.scores, &self.tokens, &self.finished, &self.error)
            == (&other.scores, &other.tokens, &other.finished, &other.error)
    }
}

impl Answer {
    pub(crate) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.token).collect()
    }
}

/// Reads a stream to its end.
pub(crate) async fn collect(stream: TokenStream) -> Answer {
    let mut answer = Answer::default();
    let mut stream = Box::pin(stream);
    while let Some(event) = tokio::time::timeout(PATIENCE, stream.next()).await.expect("the stream hangs") {
        assert!(answer.finished.is_none() && answer.error.is_none(), "an event after the last");
        match event.map(|event| event.event) {
            Ok(Some(Event::Prompt(scores))) => {
                assert!(answer.tokens.is_empty(), "scores after a token");
                answer.scores.extend(scores.tokens);
            }
            Ok(Some(Event::Token(token))) => answer.tokens.push(token),
            Ok(Some(Event::Finished(mut finished))) => {
                answer.cached = std::mem::take(&mut finished.cached_tokens);
                answer.finished = Some(finished);
            }
            Ok(None) => panic!("an event without content"),
            Err(error) => answer.error = Some(error),
        }
    }
    assert!(answer.finished.is_some() != answer.error.is_some(), "ends in exactly one way: {answer:?}");
    answer
}

impl Fixture {
    pub(crate) async fn answer(&self, request: SequenceRequest) -> Answer {
        collect(self.service.generate(request).expect("accepted")).await
    }

    /// All at the same time.
    pub(crate) async fn answers(&self, requests: &[SequenceRequest]) -> Vec<Answer> {
        let streams: Vec<_> =
            requests.iter().map(|request| self.service.generate(request.clone()).expect("accepted")).collect();
        futures::future::join_all(streams.into_iter().map(collect)).await
    }

    /// A counter, a gauge, or the count of a histogram.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name).expect("the metric is registered");
        let metric = &family.get_metric()[0];
        metric.get_counter().get_value()
            + metric.get_gauge().get_value()
            + metric.get_histogram().get_sample_count() as f64
    }

    /// Whether nothing runs or waits and every cache block is free.
    pub(crate) fn idle(&self) -> bool {
        let status = self.service.status();
        (status.running, status.waiting, status.free_blocks) == (0, 0, status.total_blocks)
    }

    /// Waits for something that happens at the next step boundary.
    pub(crate) async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
