//! A request's answer: its choices, each a sequence, merged in one stream of events.

use std::{sync::Arc, time::Instant};

use async_stream::try_stream;
use conclave_proto::v1::{
    Delta, FinishReason, Finished, GenerateEvent, PromptScores, ScoredToken, SequenceFinished, Started, Usage,
    generate_event, token_event::Event,
};
use conclave_serve::{Error, ErrorKind};
use futures::{
    StreamExt,
    stream::{self, BoxStream, Stream},
};
use tokio::sync::OwnedSemaphorePermit;

use super::{metrics::Watch, output::Output, sequence::Running};

/// Events of one request.
pub type EventStream = BoxStream<'static, Result<GenerateEvent, Error>>;

/// One choice under way.
pub(crate) struct Choice {
    pub(crate) index: u32,
    pub(crate) prompt: Arc<[u32]>,
    /// Whether the prompt's scores are reported.
    pub(crate) scores: bool,
    pub(crate) course: Course,
    pub(crate) output: Output,
    pub(crate) watch: Watch,
}

/// How a choice goes on.
pub(crate) enum Course {
    /// A replica has taken it.
    Running(Box<Running>),
    /// Not at all: it was resumed with all its tokens, the last of which completed this stop string.
    Stopped(String),
}

/// Merges the choices' events behind `started`. An error ends the stream; dropping it cancels everything.
pub(crate) fn merge(started: Started, choices: Vec<Choice>, permit: OwnedSemaphorePermit) -> EventStream {
    let mut events = stream::select_all(choices.into_iter().map(|choice| choice.events().boxed()));
    let merged = try_stream! {
        let _permit = permit;
        yield GenerateEvent { choice: 0, event: Some(generate_event::Event::Started(started)) };
        while let Some(event) = events.next().await {
            yield event?;
        }
    };
    merged.boxed()
}

impl Choice {
    /// The choice's events, up to its `Finished`.
    fn events(self) -> impl Stream<Item = Result<GenerateEvent, Error>> + Send {
        let Self { index, prompt, scores, course, mut output, mut watch } = self;
        let event = move |event| GenerateEvent { choice: index, event: Some(event) };
        let mut scores = scores.then(|| first_score(&prompt));
        try_stream! {
            let running = match course {
                Course::Running(running) => running,
                Course::Stopped(stop) => {
                    watch.end("stop");
                    yield event(generate_event::Event::Finished(stopped_by(stop, usage(&prompt, &output, 0), true)));
                    return;
                }
            };
            let mut events = std::pin::pin!(running.events());
            while let Some(next) = events.next().await {
                let (next, exact) = next.inspect_err(|error| watch.end(outcome_of(error)))?;
                if !matches!(next, Event::Prompt(_)) && let Some(tokens) = scores.take() {
                    yield event(generate_event::Event::Prompt(PromptScores { tokens }));
                }
                match next {
                    Event::Prompt(more) => scores.get_or_insert_default().extend(more.tokens),
                    Event::Token(token) => {
                        watch.token(Instant::now());
                        let step = output.push(token);
                        yield event(generate_event::Event::Delta(step.delta));
                        if let Some(stop) = step.stop {
                            watch.end("stop");
                            let finished = stopped_by(stop, usage(&prompt, &output, 0), exact);
                            yield event(generate_event::Event::Finished(finished));
                            return;
                        }
                    }
                    Event::Finished(last) => {
                        let (text, stop) = output.finish();
                        if !text.is_empty() {
                            yield event(generate_event::Event::Delta(Delta { text, tokens: Vec::new() }));
                        }
                        let finished = finished(&last, stop, usage(&prompt, &output, last.cached_tokens), exact);
                        watch.end(if finished.reason() == FinishReason::Length { "length" } else { "stop" });
                        yield event(generate_event::Event::Finished(finished));
                    }
                }
            }
        }
    }
}

/// The prompt's first token: nothing comes before it, so it has no logprob.
fn first_score(prompt: &[u32]) -> Vec<ScoredToken> {
    let token = |&token| ScoredToken { token, position: 0, logprob: None, top: Vec::new() };
    prompt.first().map(token).into_iter().collect()
}

fn usage(prompt: &[u32], output: &Output, cached_tokens: u32) -> Usage {
    let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
    Usage { prompt_tokens, completion_tokens: output.tokens(), cached_tokens }
}

fn finished(last: &SequenceFinished, stop: Option<String>, usage: Usage, exact: bool) -> Finished {
    match stop {
        Some(stop) => stopped_by(stop, usage, exact),
        None => Finished { reason: last.reason, stop: None, stop_token: last.stop_token, usage: Some(usage), exact },
    }
}

fn stopped_by(stop: String, usage: Usage, exact: bool) -> Finished {
    Finished { reason: FinishReason::Stop.into(), stop: Some(stop), stop_token: None, usage: Some(usage), exact }
}

pub(super) fn outcome_of(error: &Error) -> &'static str {
    match error.kind {
        ErrorKind::DeadlineExceeded => "deadline",
        ErrorKind::ResourceExhausted => "overload",
        _ => "error",
    }
}
