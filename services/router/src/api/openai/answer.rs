//! Runs a request's prompts and answers with one body or with server-sent events.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use async_stream::stream;
use axum::{
    Json,
    response::{
        IntoResponse, Response,
        sse::{Event as SseEvent, KeepAlive, Sse},
    },
};
use conclave_proto::v1::{GenerateEvent, GenerateRequest, Started, generate_event::Event, prompt::Prompt};
use conclave_serve::{Error, ErrorKind};
use futures::{
    StreamExt, TryStreamExt, future,
    stream::{self, BoxStream, Stream},
};
use serde::Serialize;

use super::{
    body::Envelope,
    error::ApiError,
    render::{Endpoint, Piece, Renderer, UsageBody},
    request::Shape,
};
use crate::{
    front::{EventStream, Front, RequestContext},
    trace,
};

/// An answer under way.
pub(super) struct Answer {
    envelope: Envelope,
    shape: Shape,
    /// Choices per prompt.
    choices: u32,
    /// By index in the answer.
    renderers: Vec<Renderer>,
    /// Events with the index of their choice in the answer.
    events: BoxStream<'static, Result<(u32, Event), Error>>,
}

impl Answer {
    /// Starts all prompts (they differ in nothing else); fails if one of them is refused.
    pub(super) async fn start(
        front: &Arc<Front>,
        endpoint: Endpoint,
        requests: Vec<GenerateRequest>,
        shape: Shape,
        context: RequestContext,
    ) -> Result<Self, ApiError> {
        check_count(requests.len(), front.config().max_prompts)?;
        let choices = requests.first().map_or(1, |request| request.choices.max(1));
        let logprobs = requests.first().is_some_and(|request| request.logprobs.is_some());
        let texts: Vec<_> = requests.iter().map(|request| shape.echo.then(|| prompt_text(front, request))).collect();
        let envelope = envelope(front, endpoint, &context.request_id);
        let runs = requests.into_iter().map(|request| begin(front, request, context.clone()));
        let mut renderers = Vec::new();
        let mut streams = Vec::new();
        let runs = future::try_join_all(runs).await?;
        for (first, ((started, events), text)) in (0..).step_by(choices as usize).zip(runs.into_iter().zip(texts)) {
            for index in first..first + choices {
                let opening = (&started, text.clone());
                let codec = front.model().text.clone();
                renderers.push(Renderer::new((endpoint, index), logprobs, shape.clone(), codec, opening));
            }
            let numbered = move |event: GenerateEvent| event.event.map(|inner| (first + event.choice, inner));
            streams.push(events.try_filter_map(move |event| future::ready(Ok(numbered(event)))));
        }
        Ok(Self { envelope, shape, choices, renderers, events: stream::select_all(streams).boxed() })
    }

    /// The answer as the request wants it.
    pub(super) async fn respond(self) -> Result<Response, ApiError> {
        if self.shape.stream {
            let chunks = trace::in_current_span(self.chunks().boxed());
            return Ok(Sse::new(chunks).keep_alive(KeepAlive::default()).into_response());
        }
        self.whole().await
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        let mut pieces: Vec<Piece> = self.renderers.iter_mut().map(Renderer::opening).collect();
        let mut usage = UsageBody::default();
        while let Some((index, event)) = self.events.try_next().await? {
            self.count(&mut usage, index, &event);
            if let Some(piece) = self.renderers[index as usize].piece(event) {
                pieces[index as usize].extend(piece);
            }
        }
        Ok(Json(self.envelope.whole(pieces, usage)).into_response())
    }

    /// Server-sent events; an error is the last of them, else `[DONE]` is.
    fn chunks(mut self) -> impl Stream<Item = Result<SseEvent, Infallible>> + Send {
        stream! {
            let mut usage = UsageBody::default();
            let with_usage = self.shape.include_usage;
            for renderer in &mut self.renderers {
                let piece = renderer.opening();
                if self.envelope.endpoint == Endpoint::Chat || piece != (Piece { index: piece.index, ..Piece::default() }) {
                    yield Ok(data(&self.envelope.chunk(piece, true, with_usage)));
                }
            }
            while let Some(next) = self.events.next().await {
                let (index, event) = match next {
                    Ok(event) => event,
                    Err(error) => {
                        yield Ok(data(&ApiError::from(error).body()));
                        return;
                    }
                };
                self.count(&mut usage, index, &event);
                if let Some(piece) = self.renderers[index as usize].piece(event) {
                    yield Ok(data(&self.envelope.chunk(piece, false, with_usage)));
                }
            }
            if with_usage {
                yield Ok(data(&self.envelope.usage(usage)));
            }
            yield Ok(SseEvent::default().data("[DONE]"));
        }
    }

    fn count(&self, usage: &mut UsageBody, index: u32, event: &Event) {
        if let Event::Finished(finished) = event
            && let Some(more) = &finished.usage
        {
            usage.add(more, index.is_multiple_of(self.choices));
        }
    }
}

/// Starts one prompt and takes its first event.
async fn begin(
    front: &Front,
    request: GenerateRequest,
    context: RequestContext,
) -> Result<(Started, EventStream), ApiError> {
    let mut events = front.generate(request, context).await?;
    match events.try_next().await?.and_then(|event| event.event) {
        Some(Event::Started(started)) => Ok((started, events)),
        _ => Err(Error::new(ErrorKind::Internal, "the answer began without its first event").into()),
    }
}

/// The prompt as an echo shows it.
fn prompt_text(front: &Front, request: &GenerateRequest) -> String {
    let decode = |ids: &[u32]| front.model().text.as_ref().map_or_else(String::new, |codec| codec.decode(ids));
    match request.prompt.as_ref().and_then(|prompt| prompt.prompt.as_ref()) {
        Some(Prompt::Text(text)) => text.clone(),
        Some(Prompt::Tokens(tokens)) => decode(&tokens.ids),
        _ => String::new(),
    }
}

fn check_count(prompts: usize, most: usize) -> Result<(), Error> {
    if prompts <= most {
        return Ok(());
    }
    Err(Error::invalid(format!("prompt: found {prompts} prompts, expected at most {most}")).with_param("prompt"))
}

fn envelope(front: &Front, endpoint: Endpoint, request_id: &str) -> Envelope {
    let prefix = match endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completions => "cmpl",
    };
    Envelope {
        endpoint,
        id: format!("{prefix}-{request_id}"),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()),
        model: front.model().name.clone(),
        system_fingerprint: front.model().short_fingerprint(),
    }
}

/// An event with JSON data.
fn data(body: &impl Serialize) -> SseEvent {
    let json = serde_json::to_string(body).unwrap_or_else(|error| format!("{{\"error\":{{\"message\":\"{error}\"}}}}"));
    SseEvent::default().data(json)
}
