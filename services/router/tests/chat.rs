//! `/v1/chat/completions` and the other HTTP routes.

mod support;

use conclave_serve::ErrorKind;
use serde_json::{Value, json};
use support::{ByteCodec, Connection, Script, Setup};

const PATH: &str = "/v1/chat/completions";

fn chat(more: Value) -> String {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in more.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

#[tokio::test]
async fn a_chat_is_answered() {
    let router = Setup::default().start().await;
    let answer = router.post(PATH, &chat(json!({"logprobs": true, "top_logprobs": 1, "max_tokens": 1}))).await;
    let id = answer.header("x-request-id").expect("an id").to_owned();
    let body = answer.json();
    assert_eq!((&body["object"], &body["id"]), (&json!("chat.completion"), &json!(format!("chatcmpl-{id}"))));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "h", "refusal": null}));
    let token = json!({"token": "h", "logprob": -1.06, "bytes": [104]});
    let mut first = token.clone();
    first["top_logprobs"] = json!([token]);
    assert_eq!(choice["logprobs"], json!({"content": [first]}));
    let sent = router.replicas.get("a").requests();
    assert_eq!(sent[0].tokens[1..], ByteCodec::ids("user: hi\n"));
    assert_eq!(sent[0].request_id, id);
}

#[tokio::test]
async fn without_a_limit_the_context_is_the_limit() {
    let router = Setup::default().start().await;
    router.post(PATH, &chat(json!({}))).await;
    let sent = router.replicas.get("a").requests();
    assert_eq!(sent[0].max_tokens as usize, support::CONTEXT - sent[0].tokens.len());
}

#[tokio::test]
async fn a_chat_is_streamed() {
    let router = Setup::with(Script::says("hi!")).start().await;
    let answer = router.post(PATH, &chat(json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    let chunks = answer.chunks();
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
    let deltas: Vec<&Value> = chunks[..5].iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    let content = |text: &str| json!({"content": text});
    assert_eq!(
        deltas,
        [&json!({"role": "assistant", "content": ""}), &content("h"), &content("i"), &content("!"), &json!({})]
    );
    assert_eq!(chunks[4]["choices"][0]["finish_reason"], "stop");
    assert!(chunks[..5].iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(chunks[5]["choices"], json!([]));
    assert_eq!(chunks[5]["usage"]["total_tokens"], 10 + 3);

    let plain = router.post(PATH, &chat(json!({"stream": true}))).await.chunks();
    assert!(plain.iter().all(|chunk| chunk.get("usage").is_none()) && plain.len() == 5);
}

#[tokio::test]
async fn several_choices_share_a_stream() {
    let router = Setup::with(Script::says("yes")).start().await;
    let chunks = router.post(PATH, &chat(json!({"stream": true, "n": 3}))).await.chunks();
    for index in 0..3 {
        let of = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        let text: String = of.filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, "yes");
    }
    assert_eq!(chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "stop").count(), 3);
}

#[tokio::test]
async fn an_error_in_the_midst_of_a_stream_is_its_last_event() {
    let script = Script::says("hello").breaks_after(2, ErrorKind::InvalidArgument, usize::MAX);
    let router = Setup::with(script).start().await;
    let answer = router.post(PATH, &chat(json!({"stream": true}))).await;
    let last: Value = serde_json::from_str(answer.events().last().expect("events")).expect("JSON");
    assert_eq!(last["error"]["message"], "broken by the script");
    assert!(!answer.text.contains("[DONE]"));
    assert_eq!(router.metric("conclave_sequences_total{outcome=\"error\"}"), 1.0);
}

#[tokio::test]
async fn models_are_listed() {
    let router = Setup::default().start().await;
    let list = router.get("/v1/models").await.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    assert_eq!(router.get("/v1/models/tiny").await.json()["max_model_len"], 1000);
    let (status, message, _, code) = router.get("/v1/models/org/other").await.error();
    assert_eq!((status, code.as_deref()), (404, Some("model_not_found")));
    assert_eq!(message, "model \"org/other\" is not served here, expected \"tiny\"");
}

#[tokio::test]
async fn health_follows_the_cluster() {
    let router = Setup::default().start().await;
    assert_eq!((router.get("/livez").await.status, router.get("/readyz").await.status), (200, 200));
    router.view.send_replace(support::view_of(Vec::new()));
    let message = "no attention replica of this checkpoint is ready";
    while router.get("/health").await.status == 200 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let ready = router.get("/readyz").await;
    assert_eq!((ready.status, ready.text.trim()), (503, format!("waiting: {message}").as_str()));
    let answer = router.post(PATH, &chat(json!({}))).await;
    assert_eq!((answer.error().0, answer.error().1), (503, message.to_owned()));
    assert_eq!(router.get("/livez").await.status, 200);
    let metrics = router.get("/metrics").await;
    assert!(
        metrics.text.contains("conclave_requests_total{endpoint=\"/readyz\",status=\"503\"} 1"),
        "{}",
        metrics.text
    );
}

#[tokio::test]
async fn a_clients_request_id_and_trace_are_kept() {
    let router = Setup::default().start().await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers =
        [("x-request-id", "mine-1"), ("traceparent", trace), ("content-type", "application/json; charset=utf-8")];
    let body = chat(json!({}));
    let answer = Connection::send(&router.http, "POST", PATH, &headers, body.as_bytes()).await.answer().await;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("mine-1")));
    let sent = &router.replicas.get("a").requests()[0];
    assert_eq!((sent.request_id.as_str(), sent.traceparent.as_str()), ("mine-1", trace));
}
