//! From a choice's tokens to its text: detokenising, then stop strings.

use std::sync::Arc;

use conclave_proto::v1::{Delta, ScoredToken};

use super::{
    detokenize::Detokenizer,
    stop::{Passed, StopMatcher},
    text::TextCodec,
};

/// The text side of one choice.
pub(crate) struct Output {
    codec: Option<Arc<dyn TextCodec>>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Stop strings are looked for from this many tokens on.
    min_tokens: u32,
    tokens: u32,
}

/// What a token leads to.
pub(crate) struct Step {
    pub(crate) delta: Delta,
    /// The stop string that ends the choice here.
    pub(crate) stop: Option<String>,
}

impl Output {
    pub(crate) fn new(codec: Option<Arc<dyn TextCodec>>, stop: StopMatcher, min_tokens: u32) -> Self {
        Self { codec, detokenizer: Detokenizer::default(), stop, min_tokens, tokens: 0 }
    }

    /// Tokens taken so far.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Takes the next token.
    pub(crate) fn push(&mut self, token: ScoredToken) -> Step {
        self.tokens += 1;
        let text = match &self.codec {
            Some(codec) => self.detokenizer.push(&codec.text_bytes(token.token)),
            None => String::new(),
        };
        let (text, stop) = self.pass(text);
        Step { delta: Delta { text, tokens: vec![token] }, stop }
    }

    /// Ends the choice: the text that was still withheld, and the stop string that it may end with.
    pub(crate) fn finish(&mut self) -> (String, Option<String>) {
        let rest = self.detokenizer.finish();
        let (mut text, stop) = self.pass(rest);
        text.push_str(&self.stop.finish());
        (text, stop)
    }

    fn pass(&mut self, text: String) -> (String, Option<String>) {
        if self.tokens < self.min_tokens {
            return (text, None);
        }
        match self.stop.push(&text) {
            Passed::Text(text) => (text, None),
            Passed::Stopped { text, stop } => (text, Some(stop)),
        }
    }
}
