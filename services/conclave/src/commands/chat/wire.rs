//! The JSON of the OpenAI API, as much of it as a chat needs.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::conversation::Message;
use crate::commands::SamplingArgs;

/// A request for a streamed answer.
#[derive(Debug, Clone, Serialize)]
pub struct ChatRequest {
    pub model: String,
    pub messages: Vec<Message>,
    pub stream: bool,
    pub stream_options: StreamOptions,
    #[serde(flatten)]
    pub sampling: SamplingArgs,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Asks for the ids with which the answer could be resumed; only of servers that know the field.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub return_token_ids: bool,
    /// Goes on with the choices of an answer whose stream broke.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resume: Vec<Resume>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct StreamOptions {
    pub include_usage: bool,
}

/// A choice as far as it was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Resume {
    pub index: u32,
    pub token_ids: Vec<u32>,
}

/// A piece of an answer, or a whole one where the server does not stream.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Chunk {
    pub choices: Vec<Choice>,
    pub usage: Option<Usage>,
    pub system_fingerprint: Option<String>,
    pub error: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Choice {
    /// In a piece.
    pub delta: Option<Content>,
    /// In a whole answer.
    pub message: Option<Content>,
    pub finish_reason: Option<String>,
    pub token_ids: Option<Vec<u32>>,
    pub prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Content {
    pub content: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Usage {
    pub completion_tokens: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct ModelList {
    pub data: Vec<Model>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Model {
    pub id: String,
    pub owned_by: Option<String>,
}

/// The message of an error body in any of the forms that servers use; `None` where there is none.
pub fn error_message(body: &Value) -> Option<&str> {
    let said = |value: &Value, name: &str| value.get(name).is_some();
    match body {
        Value::String(text) => Some(text),
        Value::Object(_) => {
            let name = ["error", "message", "detail"].into_iter().find(|name| said(body, name))?;
            error_message(&body[name])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_every_server_knows_is_sent() {
        let request = ChatRequest {
            model: "m".to_owned(),
            messages: vec![Message { role: "user", content: "hi".to_owned() }],
            stream: true,
            stream_options: StreamOptions { include_usage: true },
            sampling: SamplingArgs { temperature: Some(0.5), ..SamplingArgs::default() },
            max_tokens: None,
            stop: Vec::new(),
            return_token_ids: false,
            resume: Vec::new(),
        };
        let expected = json!({
            "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": true,
            "stream_options": {"include_usage": true}, "temperature": 0.5,
        });
        assert_eq!(serde_json::to_value(&request).expect("JSON"), expected);
    }

    #[test]
    fn every_form_of_error_has_its_message() {
        for body in [
            json!({"error": {"message": "why", "type": "x", "code": null}}),
            json!({"error": "why"}),
            json!({"message": "why", "object": "error"}),
            json!({"detail": "why"}),
            json!("why"),
        ] {
            assert_eq!(error_message(&body), Some("why"), "{body}");
        }
        assert_eq!(error_message(&json!({"error": {"code": 7}})), None);
    }

    #[test]
    fn chunks_of_other_servers_are_read() {
        let chunk: Chunk = serde_json::from_str(
            r#"{"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":null},"logprobs":null,"token_ids":null}],"usage":null}"#,
        )
        .expect("a chunk");
        assert!(chunk.choices[0].delta.as_ref().is_some_and(|delta| delta.content.is_none()));
    }
}
