//! The front: from a public request to a stream of events.
//!
//! A request is checked and resolved (`resolve`), its prompt tokenised on the blocking pool (`prompt`), each choice
//! given to an attention replica (`replicas`) as a sequence that outlives its replica (`sequence`), its tokens turned
//! into text (`detokenize`, `stop`, `output`) and the choices merged (`generation`). A client whose stream broke says what
//! it has, and the choices go on from there (`resume`).

mod cluster;
mod config;
mod detokenize;
mod error;
mod generation;
mod grpc_attention;
mod link;
mod metrics;
mod model;
mod output;
mod prefixes;
mod prompt;
mod replicas;
mod resolve;
mod resume;
mod sequence;
mod stop;
mod text;

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use conclave_cluster::ClusterView;
use conclave_proto::v1::{self, GenerateRequest, Prompt, ScoredPrompt, SequenceRequest, generate_event};
use conclave_serve::{Error, ErrorKind, id};
use futures::{StreamExt, TryStreamExt, future, stream};
use prometheus::Registry;
use tokio::sync::{Semaphore, watch};

pub use cluster::{ClusterLoad, NoLoad};
pub use config::FrontConfig;
pub use error::FrontError;
pub use generation::EventStream;
pub use grpc_attention::GrpcAttention;
pub use link::{AttentionConnector, AttentionLink};
pub use model::{Defaults, ServedModel};
pub use text::TextCodec;

use generation::{Choice, Course};
use metrics::{Metrics, Watch};
use output::Output;
use replicas::Replicas;
use resolve::Settings;
use sequence::{Bounds, Sequence};
use stop::StopMatcher;

/// Prompts of one scoring request that run at the same time.
const SCORING: usize = 8;

pub(crate) use detokenize::Detokenizer;

/// What comes with a request besides its message.
#[derive(Debug, Clone, Default)]
pub struct RequestContext {
    /// Names the request in logs and answers.
    pub request_id: String,
    /// W3C trace context, passed on to all parts.
    pub traceparent: String,
    /// Only requests with the same salt share cached prefixes.
    pub cache_salt: Bytes,
}

/// The front of one served model.
pub struct Front {
    config: FrontConfig,
    model: ServedModel,
    replicas: Arc<Replicas>,
    metrics: Arc<Metrics>,
    /// One permit per sequence.
    sequences: Arc<Semaphore>,
    /// One permit per prompt being tokenised.
    tokenizers: Semaphore,
}

impl Front {
    /// A front that finds attention replicas in `view` and reaches them through `connector`.
    ///
    /// # Errors
    /// When a bound of the config is zero, or the registry already has these metrics.
    pub fn new(
        config: FrontConfig,
        model: ServedModel,
        view: watch::Receiver<Arc<ClusterView>>,
        connector: Arc<dyn AttentionConnector>,
        registry: &Registry,
    ) -> Result<Arc<Self>, Error> {
        config.check()?;
        Ok(Arc::new(Self {
            replicas: Arc::new(Replicas::new(model.fingerprint.clone(), view, connector)),
            metrics: Arc::new(Metrics::new(registry)?),
            sequences: Arc::new(Semaphore::new(config.max_sequences)),
            tokenizers: Semaphore::new(config.tokenizer_threads),
            config,
            model,
        }))
    }

    /// The served model.
    pub fn model(&self) -> &ServedModel {
        &self.model
    }

    /// The bounds.
    pub fn config(&self) -> &FrontConfig {
        &self.config
    }

    /// Longest context in tokens.
    pub fn context_limit(&self) -> u32 {
        let model = u32::try_from(self.model.config.max_position).unwrap_or(u32::MAX);
        self.config.context_limit.map_or(model, |limit| limit.min(model))
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Generates. The first event is `Started`; every choice ends with `Finished`, or the stream with an error.
    /// Returns once replicas have taken all choices, so that a refusal is an error here.
    ///
    /// # Errors
    /// When the request is wrong, does not fit, or nobody takes it.
    pub async fn generate(
        &self,
        mut request: GenerateRequest,
        context: RequestContext,
    ) -> Result<EventStream, FrontError> {
        let begun = Instant::now();
        let settings = resolve::settings(&request, &self.model, &self.config, draw_seed()?)?;
        let deadline = tokio::time::Instant::now() + settings.timeout;
        let prompt: Arc<[u32]> = self.encode("prompt", request.prompt.take(), deadline).await?.into();
        let max_tokens = resolve::fit(self.context_limit(), prompt.len(), settings.max_tokens)?;
        resume::fit(&settings.choices, max_tokens)?;
        let sequences = u32::try_from(settings.choices.len()).unwrap_or(u32::MAX);
        let permit = self.sequences.clone().try_acquire_many_owned(sequences).map_err(|_| self.full())?;
        let started = v1::Started {
            request_id: context.request_id.clone(),
            seed: settings.sampling.seed,
            prompt_tokens: prompt.to_vec(),
            model: self.model.name.clone(),
        };
        let request = sequence_request(&settings, &prompt, max_tokens, context);
        let choices = settings.choices.iter().map(|choice| {
            let request = resume::sequence(&request, choice);
            self.start(request, deadline, &settings, prompt.clone(), begun)
        });
        let choices = future::try_join_all(choices).await?;
        self.metrics.prompt_tokens.inc_by(prompt.len() as u64);
        Ok(generation::merge(started, choices, permit))
    }

    async fn start(
        &self,
        request: SequenceRequest,
        deadline: tokio::time::Instant,
        settings: &Settings,
        prompt: Arc<[u32]>,
        begun: Instant,
    ) -> Result<Choice, Error> {
        let mut watch = Watch::start(self.metrics.clone(), begun);
        let stop = StopMatcher::new(settings.stop.clone(), settings.include_stop);
        let mut output = Output::new(self.model.text.clone(), stop, settings.sampling.min_tokens);
        let generated = &request.tokens[prompt.len()..];
        let replayed = output.replay(generated).inspect_err(|error| watch.end(generation::outcome_of(error)));
        let (index, scores) = (request.choice, request.prompt_logprobs.is_some() && generated.is_empty());
        if let Some(stop) = replayed? {
            return Ok(Choice { index, prompt, scores, course: Course::Stopped(stop), output, watch });
        }
        let (replicas, metrics) = (self.replicas.clone(), self.metrics.clone());
        let sequence = Sequence::new(request, deadline, replicas, metrics, Bounds::from(&self.config));
        let running = sequence.start().await.inspect_err(|error| watch.end(generation::outcome_of(error)))?;
        Ok(Choice { index, prompt, scores, course: Course::Running(Box::new(running)), output, watch })
    }

    /// Scores prompts: the logprob of every token after the first, and the `top` likeliest beside it.
    ///
    /// # Errors
    /// When a prompt is wrong, does not fit, or nobody takes it.
    pub async fn score(
        &self,
        request: v1::ScoreRequest,
        context: RequestContext,
    ) -> Result<Vec<ScoredPrompt>, FrontError> {
        let prompts = request.prompts.len();
        if prompts == 0 || prompts > self.config.max_prompts {
            let expected = format!("1 to {} prompts", self.config.max_prompts);
            return Err(resolve::invalid("prompts", format!("{prompts} prompts"), expected).into());
        }
        let scored = request.prompts.into_iter().map(|prompt| {
            let request = GenerateRequest {
                model: request.model.clone(),
                prompt: Some(prompt),
                max_tokens: Some(0),
                prompt_logprobs: Some(request.top),
                ..GenerateRequest::default()
            };
            self.score_one(request, context.clone())
        });
        stream::iter(scored).buffered(SCORING).try_collect().await
    }

    async fn score_one(&self, request: GenerateRequest, context: RequestContext) -> Result<ScoredPrompt, FrontError> {
        let mut events = self.generate(request, context).await?;
        let mut tokens = Vec::new();
        while let Some(event) = events.try_next().await? {
            if let Some(generate_event::Event::Prompt(scores)) = event.event {
                tokens = scores.tokens;
            }
        }
        Ok(ScoredPrompt { tokens })
    }

    /// Tokenises a prompt as `generate` would; the ids and how the vocabulary spells them.
    ///
    /// # Errors
    /// When the prompt is wrong or the model has no tokenizer.
    pub async fn tokenize(&self, model: &str, prompt: Option<Prompt>) -> Result<(Vec<u32>, Vec<String>), FrontError> {
        resolve::check_model(model, &self.model)?;
        let deadline = tokio::time::Instant::now() + self.config.default_timeout;
        let ids = self.encode("prompt", prompt, deadline).await?;
        let codec = self.codec("prompt")?;
        let pieces = ids.iter().map(|&id| codec.piece(id).unwrap_or_default()).collect();
        Ok((ids, pieces))
    }

    /// Decodes token ids; special tokens are left out.
    ///
    /// # Errors
    /// When an id is out of range or the model has no tokenizer.
    pub fn detokenize(&self, model: &str, ids: &[u32]) -> Result<String, FrontError> {
        resolve::check_model(model, &self.model)?;
        resolve::check_ids("ids", ids, self.model.config.vocab)?;
        Ok(self.codec("ids")?.decode(ids))
    }

    /// The served model as the API shows it.
    pub fn describe(&self) -> v1::Model {
        let view = self.replicas.view();
        let numerics = replicas::ready(&view, &self.model.fingerprint).next().map(|member| member.numerics.clone());
        self.model.describe(self.context_limit(), numerics.unwrap_or_default())
    }

    /// Whether requests can be served now; otherwise what is missing.
    ///
    /// # Errors
    /// Naming what is missing.
    pub fn readiness(&self) -> Result<(), String> {
        cluster::missing(&self.replicas.view(), &self.model).map_or(Ok(()), Err)
    }

    /// The cluster as this front sees it.
    pub async fn cluster(&self, load: &dyn ClusterLoad) -> v1::Cluster {
        cluster::report(&self.replicas, &self.model.fingerprint, load).await
    }

    /// A receiver of cluster changes: readiness may differ after each.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.replicas.changes()
    }

    fn codec(&self, param: &str) -> Result<&Arc<dyn TextCodec>, Error> {
        self.model.text.as_ref().ok_or_else(|| resolve::no_tokenizer(param))
    }

    fn full(&self) -> Error {
        let message = format!("{} sequences run already, which is the limit; retry later", self.config.max_sequences);
        Error::new(ErrorKind::ResourceExhausted, message)
    }
}

/// A seed from the operating system. Of 53 bits, so that it survives as a number in any JSON client.
fn draw_seed() -> Result<u64, Error> {
    random().map(|bits| bits >> 11)
}

/// An id for a request that came without one.
///
/// # Errors
/// When the operating system has no random numbers.
pub(crate) fn draw_request_id() -> Result<String, Error> {
    Ok(format!("{:016x}{:016x}", random()?, random()?))
}

fn random() -> Result<u64, Error> {
    id::random_u64()
        .map_err(|e| Error::new(ErrorKind::Internal, format!("random numbers of the operating system: {e}")))
}

/// The sequence of a choice, as far as all choices share it.
fn sequence_request(settings: &Settings, prompt: &[u32], max_tokens: u32, context: RequestContext) -> SequenceRequest {
    SequenceRequest {
        request_id: context.request_id,
        tokens: prompt.to_vec(),
        prompt_len: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
        choice: 0,
        sampling: Some(settings.sampling.clone()),
        max_tokens,
        stop_token_ids: settings.stop_token_ids.clone(),
        logprobs: settings.logprobs,
        prompt_logprobs: settings.prompt_logprobs,
        budget_ms: 0,
        traceparent: context.traceparent,
        cache_salt: context.cache_salt,
    }
}
