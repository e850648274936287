//! From events to the choices that a body or a chunk holds.

use std::sync::Arc;

use conclave_proto::v1::{FinishReason, Finished, ScoredToken, Started, Usage, generate_event::Event};
use serde::Serialize;

use super::{
    logprobs::{Logprobs, Names, Offsets},
    request::Shape,
};
use crate::front::TextCodec;

/// Which endpoint's words are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Chat,
    Completions,
}

/// One choice, or the next piece of one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Piece {
    pub(super) index: u32,
    pub(super) text: String,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) token_ids: Vec<u32>,
    pub(super) prompt_token_ids: Vec<u32>,
    pub(super) end: Option<End>,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct End {
    pub(super) reason: &'static str,
    pub(super) stop_reason: Option<StopReason>,
    pub(super) note: Note,
}

/// What stopped a choice: the stop string or the token.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Text(String),
    Token(u32),
}

/// What only we say: the seed that reproduces the choice, and whether it has the bits of one numerics id.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Note {
    pub(super) seed: u64,
    pub(super) exact: bool,
}

/// Renders one choice's events.
pub(super) struct Renderer {
    endpoint: Endpoint,
    index: u32,
    /// Whether logprobs are shown.
    logprobs: bool,
    shape: Shape,
    codec: Option<Arc<dyn TextCodec>>,
    seed: u64,
    /// What goes in front of the output where the prompt is echoed.
    prompt_text: Option<String>,
    prompt_tokens: Vec<u32>,
    offsets: Offsets,
}

impl Renderer {
    /// For choice `index` of the answer; `echo` is the prompt's text where it is echoed.
    pub(super) fn new(
        (endpoint, index): (Endpoint, u32),
        logprobs: bool,
        shape: Shape,
        codec: Option<Arc<dyn TextCodec>>,
        (started, echo): (&Started, Option<String>),
    ) -> Self {
        let prompt_tokens = if shape.return_ids { started.prompt_tokens.clone() } else { Vec::new() };
        let (seed, offsets) = (started.seed, Offsets::default());
        Self { endpoint, index, logprobs, shape, codec, seed, prompt_text: echo, prompt_tokens, offsets }
    }

    /// What comes before any event: an echoed prompt whose scores will not come.
    pub(super) fn opening(&mut self) -> Piece {
        let text = if self.logprobs { None } else { self.prompt_text.take() };
        Piece {
            index: self.index,
            text: text.unwrap_or_default(),
            prompt_token_ids: std::mem::take(&mut self.prompt_tokens),
            ..Piece::default()
        }
    }

    /// The piece of an event; `None` where it shows nothing.
    pub(super) fn piece(&mut self, event: Event) -> Option<Piece> {
        let mut piece = Piece { index: self.index, ..Piece::default() };
        match event {
            Event::Started(_) => return None,
            Event::Prompt(scores) => {
                piece.text = self.prompt_text.take()?;
                piece.logprobs = self.scored(&scores.tokens);
            }
            Event::Delta(delta) => {
                piece.logprobs = self.scored(&delta.tokens).filter(|_| !delta.tokens.is_empty());
                piece.token_ids = self.ids(&delta.tokens);
                piece.text = delta.text;
            }
            Event::Finished(finished) => piece.end = Some(self.end(finished)),
        }
        let shows = !piece.text.is_empty() || piece.logprobs.is_some() || !piece.token_ids.is_empty();
        (shows || piece.end.is_some()).then_some(piece)
    }

    fn ids(&self, tokens: &[ScoredToken]) -> Vec<u32> {
        if self.shape.return_ids { tokens.iter().map(|scored| scored.token).collect() } else { Vec::new() }
    }

    fn scored(&mut self, tokens: &[ScoredToken]) -> Option<Logprobs> {
        if !self.logprobs {
            return None;
        }
        let codec = self.codec.as_deref();
        let names = Names::new(codec, self.shape.tokens_as_ids);
        Some(match self.endpoint {
            Endpoint::Chat => Logprobs::Chat(names.chat(tokens)),
            Endpoint::Completions => Logprobs::Text(names.text(tokens, self.offsets.advance(codec, tokens))),
        })
    }

    fn end(&self, finished: Finished) -> End {
        let reason = if finished.reason() == FinishReason::Length { "length" } else { "stop" };
        let stop_reason = finished.stop.map(StopReason::Text).or(finished.stop_token.map(StopReason::Token));
        End { reason, stop_reason, note: Note { seed: self.seed, exact: finished.exact } }
    }
}

impl Piece {
    /// Appends the next piece of the same choice.
    pub(super) fn extend(&mut self, more: Self) {
        self.text.push_str(&more.text);
        self.token_ids.extend(more.token_ids);
        self.prompt_token_ids.extend(more.prompt_token_ids);
        self.end = more.end.or(self.end.take());
        match (&mut self.logprobs, more.logprobs) {
            (Some(all), Some(more)) => all.extend(more),
            (none, more) => *none = none.take().or(more),
        }
    }
}

/// Token counts of an answer: a prompt counts once, however many choices it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: CachedTokens,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct CachedTokens {
    cached_tokens: u32,
}

impl UsageBody {
    /// Adds a choice; `first` is the first of its prompt.
    pub(super) fn add(&mut self, usage: &Usage, first: bool) {
        if first {
            self.prompt_tokens += usage.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}
