//! The JSON of answers and of chunks.

use serde::Serialize;

use super::{
    logprobs::Logprobs,
    render::{End, Endpoint, Note, Piece, StopReason, UsageBody},
};

/// What all chunks of an answer share.
#[derive(Debug, Clone)]
pub(super) struct Envelope {
    pub(super) endpoint: Endpoint,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) system_fingerprint: String,
}

/// An answer or a chunk of one.
#[derive(Serialize)]
pub(super) struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    #[serde(flatten)]
    content: Content,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    token_ids: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    prompt_token_ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conclave: Option<Note>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Text(String),
    Message { role: &'static str, content: String, refusal: Option<String> },
    Delta(Delta),
}

#[derive(Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

const ASSISTANT: &str = "assistant";

impl Envelope {
    /// The whole answer.
    pub(super) fn whole(&self, pieces: Vec<Piece>, usage: UsageBody) -> Body<'_> {
        let content = |text| match self.endpoint {
            Endpoint::Chat => Content::Message { role: ASSISTANT, content: text, refusal: None },
            Endpoint::Completions => Content::Text(text),
        };
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completions => "text_completion",
        };
        let choices = pieces.into_iter().map(|piece| choice(piece, content)).collect();
        self.body(object, choices, Some(Some(usage)))
    }

    /// A chunk with the next piece of a choice; `opening` is its first. `usage` says that a chunk with the usage follows.
    pub(super) fn chunk(&self, piece: Piece, opening: bool, usage: bool) -> Body<'_> {
        let content = |text: String| match self.endpoint {
            Endpoint::Chat => Content::Delta(Delta {
                role: opening.then_some(ASSISTANT),
                content: (opening || !text.is_empty()).then_some(text),
            }),
            Endpoint::Completions => Content::Text(text),
        };
        self.body(self.chunk_object(), vec![choice(piece, content)], usage.then_some(None))
    }

    /// The last chunk, where the usage is asked for.
    pub(super) fn usage(&self, usage: UsageBody) -> Body<'_> {
        self.body(self.chunk_object(), Vec::new(), Some(Some(usage)))
    }

    fn chunk_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions => "text_completion",
        }
    }

    fn body(&self, object: &'static str, choices: Vec<Choice>, usage: Option<Option<UsageBody>>) -> Body<'_> {
        let Self { id, created, model, system_fingerprint, .. } = self;
        Body { id, object, created: *created, model, system_fingerprint, choices, usage }
    }
}

fn choice(piece: Piece, content: impl Fn(String) -> Content) -> Choice {
    let Piece { index, text, logprobs, token_ids, prompt_token_ids, end } = piece;
    let (finish_reason, stop_reason, conclave) = match end {
        Some(End { reason, stop_reason, note }) => (Some(reason), stop_reason, Some(note)),
        None => (None, None, None),
    };
    Choice {
        index,
        content: content(text),
        logprobs,
        finish_reason,
        stop_reason,
        token_ids,
        prompt_token_ids,
        conclave,
    }
}
