//! One answer, from the pieces that a server sends.

use std::time::Instant;

use serde_json::Value;

use super::{
    endpoint::Failure,
    wire::{Choice, Chunk, Resume, error_message},
};
use crate::commands::Speed;

const DONE: &str = "[DONE]";

/// What has come of an answer.
#[derive(Debug)]
pub struct Answer {
    /// Whether the server says the tokens, so that the answer can be resumed.
    with_tokens: bool,
    text: String,
    tokens: Vec<u32>,
    /// Text that came without a token where tokens are expected: the end of the answer, which comes again if the
    /// connection breaks right after it.
    held: String,
    prompt: Option<Vec<u32>>,
    fingerprint: Option<String>,
    finish_reason: Option<String>,
    done: bool,
    speed: Speed,
}

impl Answer {
    /// The request goes out now; `with_tokens`: it asks for token ids.
    pub fn start(with_tokens: bool, now: Instant) -> Self {
        Self {
            with_tokens,
            text: String::new(),
            tokens: Vec::new(),
            held: String::new(),
            prompt: None,
            fingerprint: None,
            finish_reason: None,
            done: false,
            speed: Speed::start(now),
        }
    }

    /// Takes the data of an event; the text that is new.
    ///
    /// # Errors
    /// When the server says one, or what comes does not go on where the answer was.
    pub fn take(&mut self, data: &str, now: Instant) -> Result<String, Failure> {
        if data == DONE {
            self.done = true;
            return Ok(String::new());
        }
        let wrong = |error| Failure::Wrong(format!("found an event that is no piece of an answer: {error}: {data}"));
        let chunk: Chunk = serde_json::from_str(data).map_err(wrong)?;
        if let Some(error) = &chunk.error {
            return Err(broken_off(error));
        }
        check_same("checkpoint", &mut self.fingerprint, chunk.system_fingerprint)?;
        let choice = chunk.choices.into_iter().next().unwrap_or_default();
        let text = self.choice(choice, now)?;
        if let Some(tokens) = chunk.usage.and_then(|usage| usage.completion_tokens) {
            self.speed.counted(tokens);
        }
        self.text.push_str(&text);
        Ok(text)
    }

    fn choice(&mut self, choice: Choice, now: Instant) -> Result<String, Failure> {
        check_same("prompt", &mut self.prompt, choice.prompt_token_ids)?;
        let text = choice.delta.or(choice.message).and_then(|content| content.content).unwrap_or_default();
        let tokens = choice.token_ids.unwrap_or_default();
        let came = if self.with_tokens { tokens.len() } else { usize::from(!text.is_empty()) };
        self.speed.came(came, now);
        self.tokens.extend(&tokens);
        let ended = choice.finish_reason.is_some();
        self.finish_reason = choice.finish_reason.or(self.finish_reason.take());
        if self.with_tokens && tokens.is_empty() {
            self.held.push_str(&text);
            return Ok(if ended { std::mem::take(&mut self.held) } else { String::new() });
        }
        Ok(text)
    }

    /// Whether all of it has come.
    pub fn complete(&self) -> bool {
        self.done
    }

    /// The stream ended without a word.
    ///
    /// # Errors
    /// When something was still to come.
    pub fn end(&mut self) -> Result<(), Failure> {
        self.done = self.finish_reason.is_some();
        if self.done {
            Ok(())
        } else {
            Err(Failure::Lost("connection lost: the stream ended before the answer".to_owned()))
        }
    }

    /// What to send so that the rest comes; `None` where the server cannot go on.
    pub fn resume(&mut self) -> Option<Vec<Resume>> {
        self.held.clear();
        let begun = self.with_tokens && self.prompt.is_some();
        begun.then(|| vec![Resume { index: 0, token_ids: self.tokens.clone() }])
    }

    /// Tokens that have come; pieces where the server does not say them.
    pub fn tokens(&self) -> u64 {
        self.speed.tokens()
    }

    /// All text so far.
    pub fn into_text(self) -> String {
        self.text
    }

    /// For people: how long it was, how fast it came, and why it ended if it did not end by itself.
    pub fn summary(&self) -> String {
        let end = match self.finish_reason.as_deref() {
            Some("length") => " · cut at the token limit",
            Some("content_filter") => " · cut by the server's content filter",
            _ => "",
        };
        format!("{}{end}", self.speed.summary())
    }
}

/// Notes a thing that every piece must agree on.
fn check_same<T: PartialEq>(what: &str, known: &mut Option<T>, found: Option<T>) -> Result<(), Failure> {
    match (&known, found) {
        (Some(known), Some(found)) if *known != found => {
            Err(Failure::Wrong(format!("the server goes on with another {what} than it began with")))
        }
        (None, found) => {
            *known = found;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// An error in the midst of an answer: a server that goes down may be there again soon.
fn broken_off(error: &Value) -> Failure {
    let message = error_message(error).map_or_else(|| error.to_string(), str::to_owned);
    match error["code"].as_str() {
        Some("service_unavailable") => Failure::Lost(message),
        _ => Failure::Wrong(message),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn piece(text: &str, ids: &[u32]) -> String {
        json!({"system_fingerprint": "fp", "choices": [{"index": 0, "delta": {"content": text}, "token_ids": ids}]})
            .to_string()
    }

    fn opening() -> String {
        let choice = json!({"delta": {"role": "assistant", "content": ""}, "prompt_token_ids": [1, 2]});
        json!({"system_fingerprint": "fp", "choices": [choice]}).to_string()
    }

    fn last(reason: &str) -> String {
        json!({"choices": [{"delta": {}, "finish_reason": reason}]}).to_string()
    }

    fn take(answer: &mut Answer, data: &[String]) -> Vec<String> {
        data.iter().map(|data| answer.take(data, Instant::now()).expect("a piece")).collect()
    }

    #[test]
    fn any_server_is_understood() {
        let begun = Instant::now();
        let mut answer = Answer::start(false, begun);
        let chunks = [r#"{"choices":[{"delta":{"role":"assistant"}}]}"#.to_owned(), piece("a", &[]), piece("b", &[])];
        assert_eq!(take(&mut answer, &chunks), ["", "a", "b"]);
        let usage = r#"{"choices":[],"usage":{"completion_tokens":12}}"#;
        take(&mut answer, &[last("length"), usage.to_owned(), DONE.to_owned()]);
        assert!(answer.complete());
        assert!(answer.summary().starts_with("12 tokens") && answer.summary().ends_with("cut at the token limit"));
        assert!(answer.resume().is_none());
        assert_eq!(answer.into_text(), "ab");
    }

    #[test]
    fn an_answer_that_is_not_streamed_is_one_piece() {
        let mut answer = Answer::start(false, Instant::now());
        let whole = json!({"choices": [{"message": {"role": "assistant", "content": "all"}, "finish_reason": "stop"}]});
        assert_eq!(take(&mut answer, &[whole.to_string()]), ["all"]);
        assert_eq!(answer.end(), Ok(()));
    }

    #[test]
    fn a_broken_answer_is_resumed_behind_its_tokens() {
        let mut answer = Answer::start(true, Instant::now());
        assert_eq!(answer.resume(), None, "nothing has come yet");
        let chunks = [opening(), piece("a", &[7]), piece("", &[8]), piece("tail", &[])];
        assert_eq!(take(&mut answer, &chunks), ["", "a", "", ""]);
        assert!(answer.end().is_err());
        assert_eq!(answer.resume(), Some(vec![Resume { index: 0, token_ids: vec![7, 8] }]));
        let chunks = [opening(), piece("é", &[9]), piece("tail", &[]), last("stop"), DONE.to_owned()];
        assert_eq!(take(&mut answer, &chunks), ["", "é", "", "tail", ""]);
        assert_eq!(answer.tokens(), 3);
        assert_eq!(answer.into_text(), "aétail");
    }

    #[test]
    fn another_server_cannot_go_on() {
        let mut answer = Answer::start(true, Instant::now());
        take(&mut answer, &[opening(), piece("a", &[7])]);
        let other = answer.take(&piece("b", &[8]).replace("fp", "xx"), Instant::now());
        let message = "the server goes on with another checkpoint than it began with";
        assert_eq!(other, Err(Failure::Wrong(message.to_owned())));
        assert!(answer.take(&opening().replace("[1,2]", "[1,3]"), Instant::now()).is_err());
    }

    #[test]
    fn errors_in_the_midst_are_told() {
        let mut answer = Answer::start(false, Instant::now());
        let mut take = |data: &str| answer.take(data, Instant::now() + Duration::from_secs(1)).expect_err("an error");
        assert_eq!(take(r#"{"error":{"message":"why","code":null}}"#), Failure::Wrong("why".to_owned()));
        let leaving = r#"{"error":{"message":"draining","code":"service_unavailable"}}"#;
        assert_eq!(take(leaving), Failure::Lost("draining".to_owned()));
        assert!(take("oops").to_string().contains("no piece of an answer"));
    }
}
