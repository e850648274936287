//! From a choice's tokens to its text: detokenising, then stop strings.

use std::sync::Arc;

use conclave_proto::v1::{Delta, ScoredToken};
use conclave_serve::Error;

use super::{
    detokenize::Detokenizer,
    resolve,
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

    /// Takes tokens whose text was given before; the stop string that ended the choice with the last of them.
    ///
    /// # Errors
    /// When a stop string ended the choice before the last.
    pub(crate) fn replay(&mut self, tokens: &[u32]) -> Result<Option<String>, Error> {
        for (count, &token) in (1..).zip(tokens) {
            if let Some(stop) = self.push(ScoredToken { token, ..ScoredToken::default() }).stop {
                let (all, found) = (tokens.len(), format!("the stop string {stop:?} after {count}"));
                let early = || resolve::invalid("resume", format!("{found} of {all} tokens"), "none before the last");
                return if count == all { Ok(Some(stop)) } else { Err(early()) };
            }
        }
        Ok(None)
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
