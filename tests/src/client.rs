//! A client of the public gRPC API that gathers a stream into one answer.

use anyhow::{Context, Result, bail};
use conclave_proto::v1::{
    Chat, Cluster, FinishReason, GenerateEvent, GenerateRequest, GetClusterRequest, Message, Prompt, SamplingOptions,
    TokenIds, generate_event::Event, inference_client::InferenceClient, prompt,
};
use tonic::{Streaming, transport::Channel};

/// Everything one choice of a request came to. Logprobs as bits: equal means the same bits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Token ids and the bits of their logprobs.
    pub tokens: Vec<(u32, Option<u32>)>,
    /// Finish reason as in the proto.
    pub reason: i32,
}

/// A connection to one router.
#[derive(Clone)]
pub struct Client {
    inner: InferenceClient<Channel>,
}

impl Client {
    /// Connects to `http://host:port`.
    pub async fn connect(url: &str) -> Result<Self> {
        let inner = InferenceClient::connect(url.to_owned()).await.with_context(|| format!("connect to {url}"))?;
        Ok(Self { inner: inner.max_decoding_message_size(64 << 20) })
    }

    /// Sends a request and gives its stream.
    pub async fn stream(&self, request: GenerateRequest) -> Result<Streaming<GenerateEvent>, tonic::Status> {
        Ok(self.inner.clone().generate(request).await?.into_inner())
    }

    /// Sends a request with one choice and waits for its end.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Answer> {
        gather(self.stream(request).await?, Answer::default()).await
    }

    /// All requests at once; answers in their order.
    pub async fn generate_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<Answer>> {
        futures::future::try_join_all(requests.into_iter().map(|request| self.generate(request))).await
    }

    /// The cluster as the router sees it.
    pub async fn cluster(&self) -> Result<Cluster> {
        Ok(self.inner.clone().get_cluster(GetClusterRequest {}).await?.into_inner())
    }

    /// The raw generated client, for calls that should fail.
    pub fn raw(&self) -> InferenceClient<Channel> {
        self.inner.clone()
    }
}

/// Reads a stream to its end, adding to what `answer` already holds.
pub async fn gather(mut stream: Streaming<GenerateEvent>, mut answer: Answer) -> Result<Answer> {
    while let Some(event) = stream.message().await? {
        if answer.take(event) {
            return Ok(answer);
        }
    }
    bail!("the stream ended without a finished event; got {answer:?}")
}

/// A chat of one user message.
pub fn chat(text: &str) -> Prompt {
    let messages = vec![Message { role: "user".into(), content: text.into() }];
    Prompt { prompt: Some(prompt::Prompt::Chat(Chat { messages })) }
}

/// A prompt of token ids.
pub fn tokens(ids: &[u32]) -> Prompt {
    Prompt { prompt: Some(prompt::Prompt::Tokens(TokenIds { ids: ids.to_vec() })) }
}

/// A greedy request with logprobs.
pub fn greedy(prompt: Prompt, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(prompt),
        sampling: Some(SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        max_tokens: Some(max_tokens),
        logprobs: Some(0),
        ..Default::default()
    }
}

/// A seeded sampling request with logprobs.
pub fn sampled(prompt: Prompt, max_tokens: u32, seed: u64) -> GenerateRequest {
    let sampling = SamplingOptions {
        seed: Some(seed),
        temperature: Some(1.0),
        top_p: Some(0.95),
        top_k: Some(50),
        presence_penalty: Some(0.2),
        ..Default::default()
    };
    GenerateRequest { sampling: Some(sampling), ..greedy(prompt, max_tokens) }
}

impl Answer {
    /// Adds an event's part. True: it was the last.
    pub fn take(&mut self, event: GenerateEvent) -> bool {
        match event.event {
            Some(Event::Delta(delta)) => {
                self.text.push_str(&delta.text);
                self.tokens.extend(delta.tokens.iter().map(|t| (t.token, t.logprob.map(f32::to_bits))));
            }
            Some(Event::Finished(finished)) => {
                self.reason = finished.reason;
                return true;
            }
            Some(Event::Started(_) | Event::Prompt(_)) | None => {}
        }
        false
    }

    /// Whether it ended by a stop token or string.
    pub fn stopped(&self) -> bool {
        self.reason == FinishReason::Stop as i32
    }
}
