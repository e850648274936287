//! Logprobs as the two endpoints show them.

use std::{collections::HashSet, fmt::Write as _};

use conclave_proto::v1::ScoredToken;
use serde::{Serialize, Serializer};

use crate::front::{Detokenizer, TextCodec};

/// JSON has no infinity; no real logprob is below this.
const LEAST: f32 = -9999.0;

/// Logprobs of a choice, or of a piece of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Text(TextLogprobs),
    Chat(ChatLogprobs),
}

/// Of `/v1/completions`: parallel lists.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct TextLogprobs {
    pub(super) tokens: Vec<String>,
    pub(super) token_logprobs: Vec<Option<f32>>,
    pub(super) top_logprobs: Vec<Option<Top>>,
    pub(super) text_offset: Vec<usize>,
}

/// A JSON object in the order of its entries: the likeliest first.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Top(pub(super) Vec<(String, f32)>);

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// Of `/v1/chat/completions`: one list.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct ChatLogprobs {
    pub(super) content: Vec<ChatToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    token: NamedToken,
    top_logprobs: Vec<NamedToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct NamedToken {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl Logprobs {
    /// Appends the next piece of the same choice.
    pub(super) fn extend(&mut self, more: Self) {
        match (self, more) {
            (Self::Text(all), Self::Text(more)) => {
                all.tokens.extend(more.tokens);
                all.token_logprobs.extend(more.token_logprobs);
                all.top_logprobs.extend(more.top_logprobs);
                all.text_offset.extend(more.text_offset);
            }
            (Self::Chat(all), Self::Chat(more)) => all.content.extend(more.content),
            (all, more) => *all = more,
        }
    }
}

/// How tokens are named.
#[derive(Clone, Copy)]
pub(super) struct Names<'a> {
    codec: Option<&'a dyn TextCodec>,
}

impl<'a> Names<'a> {
    /// By their text; by their ids where `as_ids` or without a tokenizer.
    pub(super) fn new(codec: Option<&'a dyn TextCodec>, as_ids: bool) -> Self {
        Self { codec: codec.filter(|_| !as_ids) }
    }

    /// The token's text; `bytes:\xe4\xbd` where its bytes are no UTF-8, `token_id:7` where it has no text.
    fn name(&self, id: u32) -> String {
        match self.bytes(id) {
            None => format!("token_id:{id}"),
            Some(bytes) => String::from_utf8(bytes).unwrap_or_else(|error| {
                error.as_bytes().iter().fold("bytes:".to_owned(), |mut name, byte| {
                    let _ = write!(name, "\\x{byte:02x}");
                    name
                })
            }),
        }
    }

    fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.codec.and_then(|codec| codec.token_bytes(id))
    }

    fn named(&self, token: u32, logprob: f32) -> NamedToken {
        NamedToken { token: self.name(token), logprob: logprob.max(LEAST), bytes: self.bytes(token) }
    }

    /// For chat.
    pub(super) fn chat(&self, tokens: &[ScoredToken]) -> ChatLogprobs {
        let token = |scored: &ScoredToken| ChatToken {
            token: self.named(scored.token, scored.logprob.unwrap_or(LEAST)),
            top_logprobs: scored.top.iter().map(|top| self.named(top.token, top.logprob)).collect(),
        };
        ChatLogprobs { content: tokens.iter().map(token).collect() }
    }

    /// For completions; `offsets` gives each token's place in the text.
    pub(super) fn text(&self, tokens: &[ScoredToken], offsets: Vec<usize>) -> TextLogprobs {
        TextLogprobs {
            tokens: tokens.iter().map(|scored| self.name(scored.token)).collect(),
            token_logprobs: tokens.iter().map(|scored| scored.logprob.map(|value| value.max(LEAST))).collect(),
            top_logprobs: tokens.iter().map(|scored| self.top(scored)).collect(),
            text_offset: offsets,
        }
    }

    /// The likeliest tokens, and the chosen one where it is none of them.
    fn top(&self, scored: &ScoredToken) -> Option<Top> {
        let chosen = (scored.token, scored.logprob?);
        let all = scored.top.iter().map(|top| (top.token, top.logprob)).chain([chosen]);
        let mut seen = HashSet::new();
        let entries = all.map(|(token, logprob)| (self.name(token), logprob.max(LEAST)));
        Some(Top(entries.filter(|(name, _)| seen.insert(name.clone())).collect()))
    }
}

/// Where tokens stand in a text, in characters.
#[derive(Default)]
pub(super) struct Offsets {
    detokenizer: Detokenizer,
    characters: usize,
}

impl Offsets {
    /// The next tokens' places. A token in the midst of a character stands where the character does.
    pub(super) fn advance(&mut self, codec: Option<&dyn TextCodec>, tokens: &[ScoredToken]) -> Vec<usize> {
        let place = |scored: &ScoredToken| {
            let at = self.characters;
            if let Some(codec) = codec {
                self.characters += self.detokenizer.push(&codec.text_bytes(scored.token)).chars().count();
            }
            at
        };
        tokens.iter().map(place).collect()
    }
}
