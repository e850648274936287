//! Wrong requests, each with its error.

mod support;

use conclave_router::ApiKeys;
use serde_json::json;
use support::{Connection, Script, Setup};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn wrong_fields_are_named() {
    let router = Setup::default().start().await;
    for (body, param, message) in [
        (json!({"prompt": "x", "temperature": -0.5}), "temperature", "temperature: found -0.5, expected 0 to 2"),
        (
            json!({"prompt": "x", "temperature": "hot"}),
            "temperature",
            "temperature: found the string \"hot\", expected a number",
        ),
        (json!({"prompt": "x", "top_p": 0}), "top_p", "top_p: found 0, expected more than 0"),
        (json!({"prompt": "x", "top_p": 1.5}), "top_p", "top_p: found 1.5, expected 0 to 1"),
        (json!({"prompt": "x", "min_p": 2}), "min_p", "min_p: found 2, expected 0 to 1"),
        (json!({"prompt": "x", "top_k": -2}), "top_k", "top_k: found -2, expected an integer from -1 to 4294967295"),
        (
            json!({"prompt": "x", "presence_penalty": 3}),
            "presence_penalty",
            "presence_penalty: found 3, expected -2 to 2",
        ),
        (
            json!({"prompt": "x", "frequency_penalty": -3}),
            "frequency_penalty",
            "frequency_penalty: found -3, expected -2 to 2",
        ),
        (
            json!({"prompt": "x", "repetition_penalty": 0}),
            "repetition_penalty",
            "repetition_penalty: found 0, expected more than 0",
        ),
        (json!({"prompt": "x", "logit_bias": {"5": 101}}), "logit_bias", "logit_bias: found 101, expected -100 to 100"),
        (
            json!({"prompt": "x", "logit_bias": {"300": 1}}),
            "logit_bias",
            "logit_bias: found token id 300, expected ids below 300",
        ),
        (
            json!({"prompt": "x", "logit_bias": {"a": 1}}),
            "logit_bias",
            "logit_bias: found the string \"a\", expected a token id as key",
        ),
        (json!({"prompt": "x", "n": 0}), "n", "n: found 0, expected an integer from 1 to 128"),
        (json!({"prompt": "x", "n": 129}), "n", "n: found 129, expected an integer from 1 to 128"),
        (json!({"prompt": "x", "logprobs": 21}), "logprobs", "logprobs: found 21, expected at most 20"),
        (
            json!({"prompt": "x", "max_tokens": 0}),
            "max_tokens",
            "max_tokens: found 0, expected at least 1, or 0 together with logprobs of the prompt",
        ),
        (
            json!({"prompt": "x", "max_tokens": -1}),
            "max_tokens",
            "max_tokens: found -1, expected an integer from 0 to 4294967295",
        ),
        (
            json!({"prompt": "x", "min_tokens": 17}),
            "min_tokens",
            "min_tokens: found 17, expected at most max_tokens, which is 16",
        ),
        (json!({"prompt": "x", "stop": [""]}), "stop", "stop: found a string of 0 bytes, expected 1 to 1024 bytes"),
        (json!({"prompt": "x", "stop": 5}), "stop", "stop: found 5, expected a string or an array of strings"),
        (json!({"prompt": "x", "stop": vec!["a"; 17]}), "stop", "stop: found 17 strings, expected at most 16"),
        (
            json!({"prompt": "x", "stop_token_ids": [300]}),
            "stop_token_ids",
            "stop_token_ids: found token id 300, expected ids below 300",
        ),
        (json!({"prompt": ""}), "prompt", "prompt: found an empty text, expected at least one character"),
        (json!({"prompt": [[]]}), "prompt", "prompt: found no tokens, expected at least one"),
        (json!({"prompt": [5, 300]}), "prompt", "prompt: found token id 300, expected ids below 300"),
        (json!({"prompt": "x", "seed": "s"}), "seed", "seed: found the string \"s\", expected a 64-bit integer"),
        (json!({"prompt": "x", "stream": "yes"}), "stream", "stream: found the string \"yes\", expected true or false"),
        (
            json!({"prompt": "x", "response_format": {"type": "json_object"}}),
            "response_format",
            "response_format: an object is not supported here",
        ),
        (
            json!({"prompt": "x", "max_tokens": 3, "max_completion_tokens": 4}),
            "max_completion_tokens",
            "max_tokens is 3 and max_completion_tokens is 4, expected one of them",
        ),
    ] {
        let answer = router.post(COMPLETIONS, &body.to_string()).await;
        assert_eq!(answer.error(), (400, message.to_owned(), Some(param.to_owned()), None), "{body}");
    }
    let roles = json!({"messages": [{"role": "tool", "content": "x"}]}).to_string();
    let (_, message, param, _) = router.post(CHAT, &roles).await.error();
    assert_eq!(message, "messages[0].role: found \"tool\", expected one of system, user, assistant");
    assert_eq!(param.as_deref(), Some("messages[0].role"));
    let (_, message, _, _) = router.post(CHAT, r#"{"messages":[]}"#).await.error();
    assert_eq!(message, "messages: found 0 messages, expected 1 to 4096");
    let asked =
        json!({"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 21}).to_string();
    assert_eq!(router.post(CHAT, &asked).await.error().1, "top_logprobs: found 21, expected an integer from 0 to 20");
    assert!(router.replicas.get("a").requests().is_empty(), "nothing wrong reached attention");
}

#[tokio::test]
async fn another_model_is_not_found() {
    let router = Setup::default().start().await;
    let answer = router.post(COMPLETIONS, r#"{"model":"gpt-4","prompt":"x"}"#).await;
    let message = "model \"gpt-4\" is not served here, expected \"tiny\"".to_owned();
    assert_eq!(answer.error(), (404, message, Some("model".to_owned()), Some("model_not_found".to_owned())));
}

#[tokio::test]
async fn what_does_not_fit_into_the_context_is_refused_with_the_numbers() {
    let router = Setup::default().start().await;
    let error = |prompt: usize, asked: usize| {
        let message = format!(
            "this model's maximum context length is 1000 tokens; the request has {prompt} prompt tokens and asks for {asked} more"
        );
        (400, message, Some("max_tokens".to_owned()), Some("context_length_exceeded".to_owned()))
    };
    let answer = router.post(COMPLETIONS, r#"{"prompt":"x","max_tokens":999}"#).await;
    assert_eq!(answer.error(), error(2, 999));
    let answer = router.post(COMPLETIONS, r#"{"prompt":"x","max_tokens":998}"#).await;
    assert_eq!(answer.status, 200);
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(1000)}]}).to_string();
    assert_eq!(router.post(CHAT, &long).await.error(), error(1008, 1));
}

#[tokio::test]
async fn a_prompt_of_ten_megabytes_is_refused() {
    let router = Setup::default().start().await;
    let text = "x".repeat(10_000_000);
    let answer = router.post(COMPLETIONS, &json!({"prompt": text}).to_string()).await;
    let message = "prompt: found 10000000 bytes of text, expected at most 4194304".to_owned();
    assert_eq!(answer.error(), (400, message, Some("prompt".to_owned()), None));
    let body = json!({"messages": [{"role": "user", "content": text}]}).to_string();
    assert_eq!(
        router.post(CHAT, &body).await.error().1,
        "messages: found 10000000 bytes of text, expected at most 4194304"
    );
}

#[tokio::test]
async fn a_body_past_the_limit_is_refused_after_it_was_sent() {
    let router = Setup::default().start().await;
    let answer = router.post(COMPLETIONS, &" ".repeat(34_000_000)).await;
    let message = "body: found 34000000 bytes or more, expected at most 33554432".to_owned();
    assert_eq!(answer.error(), (413, message, None, Some("request_too_large".to_owned())));
}

#[tokio::test]
async fn everything_is_answered_in_the_same_shape() {
    let router = Setup::default().start().await;
    let (status, message, _, code) = router.get("/v1/engines").await.error();
    assert_eq!((status, message.as_str(), code.as_deref()), (404, "there is no GET /v1/engines", Some("unknown_url")));
    let (status, message, _, code) = router.get(COMPLETIONS).await.error();
    assert_eq!((status, code.as_deref()), (405, Some("method_not_allowed")));
    assert_eq!(message, "/v1/completions is there, but not for GET");
    let (status, message, _, code) = router.post(COMPLETIONS, "{\"prompt\": \n ]").await.error();
    assert_eq!((status, code.as_deref()), (400, Some("invalid_json")));
    assert_eq!(message, "the body is not valid JSON: expected value at line 2 column 2");
    assert_eq!(router.post(COMPLETIONS, "[1]").await.error().1, "body: found an array of 1, expected a JSON object");
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let answer = Connection::send(&router.http, "POST", CHAT, &form, b"{}").await.answer().await;
    let message = "content-type: found \"application/x-www-form-urlencoded\", expected \"application/json\"".to_owned();
    assert_eq!(answer.error(), (415, message, None, Some("unsupported_media_type".to_owned())));
    assert!(answer.header("x-request-id").is_some());
}

#[tokio::test]
async fn keys_are_asked_for_on_v1_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("keys");
    std::fs::write(&path, "# keys\nsk-test\n").expect("written");
    let keys = ApiKeys::load(&path).expect("a key");
    let router = Setup { keys, ..Setup::with(Script::says("x")) }.start().await;
    let code = Some("invalid_api_key".to_owned());
    let none = "no API key found, expected the header \"Authorization: Bearer KEY\"".to_owned();
    assert_eq!(router.post(COMPLETIONS, r#"{"prompt":"x"}"#).await.error(), (401, none.clone(), None, code.clone()));
    assert_eq!(router.get("/v1/models").await.error(), (401, none, None, code.clone()));
    let with = async |key: &str| {
        let headers = [("authorization", key), ("content-type", "application/json")];
        Connection::send(&router.http, "POST", COMPLETIONS, &headers, br#"{"prompt":"x"}"#).await.answer().await
    };
    assert_eq!(with("Bearer sk-other").await.error(), (401, "the API key is not known here".to_owned(), None, code));
    assert_eq!(with("Bearer sk-test").await.status, 200);
    assert_eq!(router.get("/metrics").await.status, 200);
    assert_eq!(router.get("/readyz").await.status, 200);
}

#[test]
fn a_missing_key_file_is_named() {
    let error = ApiKeys::load(std::path::Path::new("/nowhere/keys")).err().expect("refused");
    assert!(error.message.starts_with("API keys /nowhere/keys: "), "{error}");
}
