//! `/v1/completions` against replicas that follow a script.

mod support;

use std::sync::atomic::Ordering;

use conclave_router::FrontConfig;
use serde_json::{Value, json};
use support::{ByteCodec, FINGERPRINT, Router, Script, Setup, eventually};

async fn complete(router: &Router, body: Value) -> Value {
    let answer = router.post("/v1/completions", &body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().expect("choices").iter().map(|choice| choice["text"].as_str().expect("text")).collect()
}

#[tokio::test]
async fn a_prompt_is_completed() {
    let router = Setup::default().start().await;
    let answer = complete(&router, json!({"model": "tiny", "prompt": "hi", "seed": 7})).await;
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "tiny");
    assert_eq!(answer["system_fingerprint"], format!("fp_{}", &FINGERPRINT[..12]));
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("hello world"), &json!("stop")));
    assert_eq!((&choice["stop_reason"], &choice["conclave"]), (&json!(1), &json!({"seed": 7, "exact": true})));
    assert_eq!(choice["logprobs"], Value::Null);
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 11, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 3}});
    assert_eq!(answer["usage"], usage);

    let sent = &router.replicas.get("a").requests()[0];
    let sampling = sent.sampling.clone().expect("resolved");
    assert_eq!((sampling.seed, sampling.temperature, sampling.top_p), (7, 0.3, 1.0));
    assert_eq!((sent.prompt_len, sent.max_tokens, &sent.stop_token_ids[..]), (3, 16, &[1][..]));
    assert_eq!(router.metric("conclave_completion_tokens_total"), 11.0);
    assert_eq!(router.metric("conclave_prompt_tokens_total"), 3.0);
    assert_eq!(router.metric("conclave_sequences_total{outcome=\"stop\"}"), 1.0);
    assert_eq!(router.metric("conclave_requests_total{endpoint=\"/v1/completions\",status=\"200\"}"), 1.0);
}

#[tokio::test]
async fn the_seed_is_drawn_and_reproduces() {
    let router = Setup::default().start().await;
    let first =
        complete(&router, json!({"prompt": "hi"})).await["choices"][0]["conclave"]["seed"].as_u64().expect("a seed");
    let second = complete(&router, json!({"prompt": "hi", "seed": first})).await;
    assert_eq!(second["choices"][0]["conclave"]["seed"], first);
    let seeds: Vec<u64> = router
        .replicas
        .get("a")
        .requests()
        .iter()
        .map(|request| request.sampling.clone().expect("there").seed)
        .collect();
    assert_eq!(seeds, [first, first]);
    let other = complete(&router, json!({"prompt": "hi"})).await;
    assert_ne!(other["choices"][0]["conclave"]["seed"], first);
}

#[tokio::test]
async fn a_stop_string_ends_text_usage_and_attention() {
    let router = Setup::with(Script::says("hello world").hangs()).start().await;
    let answer = complete(&router, json!({"prompt": "hi", "stop": ["o wo", "zzz"]})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("hell"), &json!("o wo")));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    assert_eq!(router.replicas.get("a").cancelled.load(Ordering::SeqCst), 1);

    let body = json!({"prompt": "hi", "stop": "o wo", "include_stop_str_in_output": true});
    assert_eq!(texts(&complete(&router, body).await), ["hello wo"]);
    let body = json!({"prompt": "hi", "stop": "l", "min_tokens": 4});
    assert_eq!(texts(&complete(&router, body).await), ["hel"]);
    let body = json!({"prompt": "hi", "stop": "l", "min_tokens": 5});
    assert_eq!(texts(&complete(&router, body).await), ["hello wor"]);
}

#[tokio::test]
async fn prompts_and_choices_are_numbered() {
    let router = Setup::default().start().await;
    let answer = complete(&router, json!({"prompt": ["a", "bc"], "n": 2, "echo": true, "max_tokens": 5})).await;
    assert_eq!(texts(&answer), ["ahello", "ahello", "bchello", "bchello"]);
    let indices: Vec<_> =
        answer["choices"].as_array().expect("choices").iter().map(|choice| &choice["index"]).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(answer["choices"][3]["finish_reason"], "length");
    assert_eq!(answer["usage"]["prompt_tokens"], 2 + 3);
    assert_eq!(answer["usage"]["completion_tokens"], 20);
    let mut sent: Vec<_> = router.replicas.get("a").requests().iter().map(|r| (r.prompt_len, r.choice)).collect();
    sent.sort_unstable();
    assert_eq!(sent, [(2, 0), (2, 1), (3, 0), (3, 1)]);
}

#[tokio::test]
async fn token_ids_are_taken_verbatim() {
    let router = Setup::default().start().await;
    let ids = ByteCodec::ids("ab");
    let answer =
        complete(&router, json!({"prompt": ids, "echo": true, "return_token_ids": true, "max_tokens": 2})).await;
    assert_eq!(texts(&answer), ["abhe"]);
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!(ids));
    assert_eq!(answer["choices"][0]["token_ids"], json!(ByteCodec::ids("he")));
    assert_eq!(router.replicas.get("a").requests()[0].tokens, ids);
}

#[tokio::test]
async fn a_prompt_is_scored() {
    let router = Setup::default().start().await;
    let body = json!({"prompt": "ab", "max_tokens": 0, "echo": true, "logprobs": 2});
    let answer = complete(&router, body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("length")));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let expected = json!({
        "tokens": ["<bos>", "a", "b"],
        "token_logprobs": [null, -0.99, -1.0],
        "top_logprobs": [null, {"a": -0.99, "b": -1.0}, {"b": -1.0, "c": -1.01}],
        "text_offset": [0, 0, 1],
    });
    assert_eq!(choice["logprobs"].to_string(), expected.to_string());

    let answer = complete(&router, json!({"prompt": "ab", "max_tokens": 0, "echo": true})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["logprobs"]), (&json!("ab"), &Value::Null), "no scores were asked for");

    let body =
        json!({"prompt": "ab", "max_tokens": 1, "echo": true, "logprobs": 1, "return_tokens_as_token_ids": true});
    let answer = complete(&router, body).await;
    assert_eq!(
        answer["choices"][0]["logprobs"]["tokens"],
        json!(["token_id:0", "token_id:99", "token_id:100", "token_id:106"])
    );
    assert_eq!(answer["choices"][0]["logprobs"]["text_offset"], json!([0, 0, 1, 2]));
}

#[tokio::test]
async fn characters_in_pieces_are_named_by_their_bytes() {
    let router = Setup::with(Script::says("a你")).start().await;
    let answer = complete(&router, json!({"prompt": "x", "logprobs": 0})).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(answer["choices"][0]["text"], "a你");
    assert_eq!(logprobs["tokens"], json!(["a", "bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 1, 1]));
    assert_eq!(logprobs["top_logprobs"][0], json!({"a": -0.99}));
}

#[tokio::test]
async fn a_stream_never_splits_a_character() {
    let router = Setup::with(Script::says("é你😀!")).start().await;
    let answer = router.post("/v1/completions", r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let pieces: Vec<String> =
        answer.chunks().iter().map(|chunk| chunk["choices"][0]["text"].as_str().expect("text").to_owned()).collect();
    assert_eq!(pieces, ["é", "你", "😀", "!", ""]);
}

#[tokio::test]
async fn what_never_becomes_a_character_is_replaced() {
    let router = Setup::with(Script::says("a你")).start().await;
    let answer = complete(&router, json!({"prompt": "x", "max_tokens": 3})).await;
    assert_eq!(texts(&answer), ["a\u{fffd}"]);
}

#[tokio::test]
async fn an_echoed_stream_begins_with_the_prompt() {
    let router = Setup::with(Script::says("b")).start().await;
    let answer = router.post("/v1/completions", r#"{"prompt":"a","stream":true,"echo":true,"logprobs":0}"#).await;
    let chunks = answer.chunks();
    assert_eq!(chunks[0]["choices"][0]["text"], "a");
    assert_eq!(chunks[0]["choices"][0]["logprobs"]["tokens"], json!(["<bos>", "a"]));
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["text_offset"], json!([1]));
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    let answer = router.post("/v1/completions", r#"{"prompt":"a","stream":true,"echo":true}"#).await;
    assert_eq!(answer.chunks()[0]["choices"][0]["text"], "a");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_sequences() {
    let router = Setup::with(Script::says("hello").hangs()).start().await;
    let replica = router.replicas.get("a").clone();
    let mut connection = router.begin("/v1/completions", r#"{"prompt":"x","stream":true,"n":2}"#).await;
    connection.read_until("\"o\"").await;
    assert_eq!(replica.cancelled.load(Ordering::SeqCst), 0);
    assert_eq!(router.metric("conclave_active_sequences"), 2.0);
    drop(connection);
    eventually("both sequences are cancelled", || replica.cancelled.load(Ordering::SeqCst) == 2).await;

    let connection = router.begin("/v1/completions", r#"{"prompt":"x"}"#).await;
    eventually("the sequence runs", || replica.requests().len() == 3).await;
    drop(connection);
    eventually("a whole answer is cancelled as well", || replica.cancelled.load(Ordering::SeqCst) == 3).await;
    eventually("nothing runs", || router.metric("conclave_active_sequences") == 0.0).await;
    assert_eq!(router.metric("conclave_sequences_total{outcome=\"cancelled\"}"), 3.0);
}

#[tokio::test]
async fn a_model_without_tokenizer_takes_ids_only() {
    let router = Setup { codec: None, ..Setup::default() }.start().await;
    let body = json!({"prompt": [5, 6], "max_tokens": 2, "logprobs": 0, "return_token_ids": true});
    let answer = complete(&router, body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["token_ids"]), (&json!(""), &json!(ByteCodec::ids("he"))));
    assert_eq!(choice["logprobs"]["tokens"], json!(["token_id:106", "token_id:103"]));
    let message =
        |param: &str| format!("{param}: found text, expected token ids: this model's checkpoint has no tokenizer");
    for (path, body, param) in [
        ("/v1/completions", r#"{"prompt":"x"}"#, "prompt"),
        ("/v1/completions", r#"{"prompt":[5],"stop":"x"}"#, "stop"),
        ("/v1/chat/completions", r#"{"messages":[{"role":"user","content":"x"}]}"#, "messages"),
    ] {
        let (status, found, named, _) = router.post(path, body).await.error();
        assert_eq!((status, found, named.as_deref()), (400, message(param), Some(param)));
    }
}

#[tokio::test]
async fn more_sequences_than_allowed_are_refused_at_once() {
    let config = FrontConfig { max_sequences: 2, ..FrontConfig::default() };
    let router = Setup { config, ..Setup::with(Script::says("x").hangs()) }.start().await;
    let mut busy = router.begin("/v1/completions", r#"{"prompt":"x","stream":true,"n":2}"#).await;
    busy.read_until("data:").await;
    let answer = router.post("/v1/completions", r#"{"prompt":"x"}"#).await;
    let message = "2 sequences run already, which is the limit; retry later".to_owned();
    assert_eq!(answer.error(), (429, message, None, Some("rate_limit_exceeded".to_owned())));
    assert_eq!(answer.header("retry-after"), Some("1"));
}
