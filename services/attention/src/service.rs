//! The service: requests in, streams of events out.

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use conclave_dispatch::MoeLink;
use conclave_kernels::Device;
use conclave_model::Checkpoint;
use conclave_proto::InstanceId;
use conclave_proto::v1::{AttentionStatus, SequenceRequest, TokenEvent, token_event::Event};
use conclave_serve::{Error, ErrorKind, telemetry};
use futures::Stream;
use prometheus::Registry;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Sleep;

use crate::engine::{Engine, Parts};
use crate::forward::MoeCaller;
use crate::metrics::Metrics;
use crate::request::{self, Bounds};
use crate::sequence::Sequence;
use crate::state::{Phase, State, stopped};
use crate::trunk::{DeviceTrunk, Trunk, TrunkShape};
use crate::{AttentionConfig, AttentionError};

/// An attention service: the handle of its engine.
#[derive(Debug)]
pub struct AttentionService {
    identity: Identity,
    bounds: Bounds,
    total_blocks: u32,
    /// Bits do not depend on how rows come together.
    exact: bool,
    submit: mpsc::Sender<Sequence>,
    state: Arc<State>,
}

/// Who this is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) instance: InstanceId,
    pub(crate) fingerprint: String,
    pub(crate) numerics: String,
}

impl AttentionService {
    /// Loads the trunk of `checkpoint` into `device` and starts the engine, whose thread then runs the calls to `moe`. Blocks
    /// while it loads.
    ///
    /// # Errors
    /// When a setting contradicts the model, memory does not suffice, or a tensor is refused.
    pub fn start<D: Device>(
        config: AttentionConfig,
        device: Arc<D>,
        checkpoint: Arc<Checkpoint>,
        moe: Arc<dyn MoeLink>,
        registry: &Registry,
    ) -> Result<Arc<Self>, AttentionError> {
        let size = config.size(&*device, &checkpoint)?;
        let trunk = DeviceTrunk::load(device, &checkpoint, size, &config.progress)?;
        Self::with_trunk(config, trunk, checkpoint.fingerprint(), moe, registry)
    }

    /// Starts the engine on a trunk that is loaded already.
    ///
    /// # Errors
    /// As for [`AttentionService::start`].
    pub fn with_trunk<T: Trunk>(
        config: AttentionConfig,
        trunk: T,
        fingerprint: &str,
        moe: Arc<dyn MoeLink>,
        registry: &Registry,
    ) -> Result<Arc<Self>, AttentionError> {
        let TrunkShape { vocab, block, blocks, context_limit, ref numerics, .. } = *trunk.shape();
        let positions = block * blocks as usize;
        if context_limit > positions {
            let expected = format!("at most the {positions} positions that the cache holds");
            return Err(AttentionError::config("context_limit", context_limit, expected));
        }
        let identity = Identity {
            instance: config.instance.clone(),
            fingerprint: fingerprint.to_owned(),
            numerics: numerics.clone(),
        };
        let (submit, submitted) = mpsc::channel();
        let state = State::new(config.max_running.saturating_add(config.max_waiting), blocks);
        let engine = Engine::new(Parts {
            moe: MoeCaller::new(moe, incarnation(&config.instance)).map_err(AttentionError::Thread)?,
            limits: config.limits(block)?,
            step_target: config.step_target,
            micro_batches: config.micro_batches,
            mask: config.mask(vocab)?,
            moe_retry_limit: config.moe_retry_limit,
            prefix_cache: config.prefix_cache,
            submitted,
            state: Arc::clone(&state),
            metrics: Metrics::new(registry)?,
            trunk,
        });
        let exact = config.exact;
        let thread = thread::Builder::new().name("attention".into());
        thread.spawn(move || engine.run()).map_err(AttentionError::Thread)?;
        let bounds = Bounds { vocab, context_limit, max_logprobs: config.max_logprobs };
        Ok(Arc::new(Self { identity, bounds, total_blocks: blocks, exact, submit, state }))
    }

    /// Starts a sequence. Dropping the stream cancels it at the next step boundary. To be called within a Tokio runtime.
    ///
    /// # Errors
    /// When the request is malformed or too long, the queue is full, or the service is draining or has stopped.
    pub fn generate(&self, request: SequenceRequest) -> Result<TokenStream, Error> {
        let request = request::check(request, &self.bounds)?;
        let ticket = self.state.admit()?;
        let span = tracing::info_span!(
            "attention",
            request = request.id,
            choice = request.choice,
            tokens = request.tokens.len(),
            prompt = request.prompt_len
        );
        telemetry::set_parent(&span, &request.traceparent);
        let (events, receiver) = unbounded_channel();
        let stream = TokenStream::new(receiver, request.budget);
        let mut sequence = Sequence::new(request, events, span, ticket);
        sequence.inexact = !self.exact;
        match sequence.end() {
            Some(end) => sequence.finish(end),
            None => self.submit.send(sequence).map_err(|_| stopped())?,
        }
        Ok(stream)
    }

    /// Load and identity.
    pub fn status(&self) -> AttentionStatus {
        let state = match self.state.phase() {
            Phase::Ready => "ready",
            Phase::Leaving => "leaving",
            Phase::Stopped => "stopped",
        };
        let running = self.state.running.load(Ordering::Relaxed);
        AttentionStatus {
            instance: self.identity.instance.0.clone(),
            fingerprint: self.identity.fingerprint.clone(),
            numerics: self.identity.numerics.clone(),
            state: state.into(),
            running,
            waiting: u32::try_from(self.state.open()).unwrap_or(u32::MAX).saturating_sub(running),
            free_blocks: self.state.free_blocks.load(Ordering::Relaxed),
            total_blocks: self.total_blocks,
            context_limit: self.bounds.context_limit as u32,
        }
    }

    /// Takes nothing new from now on and waits until all that runs or waits has ended.
    pub async fn drain(&self) {
        self.state.leave();
        self.state.idle().await;
    }

    /// Waits until the engine has ended, which it does only when something is badly wrong.
    pub async fn stopped(&self) {
        self.state.stopped().await;
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }
}

/// A name for this run of the process that no earlier one had.
fn incarnation(instance: &InstanceId) -> u64 {
    // Keyed by the operating system's random numbers.
    RandomState::new().hash_one((&instance.0, std::process::id(), std::time::SystemTime::now()))
}

/// How long after its deadline a sequence that the engine has not ended yet is ended here.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);

/// The events of a sequence. Ends after the finishing event or an error.
#[derive(Debug)]
pub struct TokenStream {
    receiver: UnboundedReceiver<Result<TokenEvent, Error>>,
    /// For a step that does not come to its end: the engine looks at deadlines between steps.
    expiry: Option<Pin<Box<Sleep>>>,
    finished: bool,
}

impl TokenStream {
    fn new(receiver: UnboundedReceiver<Result<TokenEvent, Error>>, budget: Option<Duration>) -> Self {
        let expiry = budget.map(|budget| Box::pin(tokio::time::sleep(budget.saturating_add(DEADLINE_GRACE))));
        Self { receiver, expiry, finished: false }
    }

    fn expired(&mut self, context: &mut Context<'_>) -> bool {
        self.expiry.as_mut().is_some_and(|expiry| expiry.as_mut().poll(context).is_ready())
    }
}

impl Stream for TokenStream {
    type Item = Result<TokenEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let event = match self.receiver.poll_recv(context) {
            Poll::Ready(event) => event.unwrap_or_else(|| Err(stopped())),
            Poll::Pending if self.expired(context) => {
                self.receiver.close();
                Err(Error::new(ErrorKind::DeadlineExceeded, "deadline exceeded in the middle of a step"))
            }
            Poll::Pending => return Poll::Pending,
        };
        self.finished = !matches!(&event, Ok(TokenEvent { event: Some(Event::Token(_) | Event::Prompt(_)), .. }));
        Poll::Ready(Some(event))
    }
}
