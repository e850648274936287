//! Sequences that outlive their replicas.

mod support;

use std::{sync::atomic::Ordering, time::Duration};

use conclave_proto::v1::{
    DrainRequest, DrainResponse, SequenceRequest, StatusRequest, TokenEvent,
    attention_server::{Attention, AttentionServer},
};
use conclave_router::{AttentionConnector, FrontConfig, GrpcAttention};
use conclave_serve::{Error, ErrorKind};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use serde_json::json;
use support::{ByteCodec, Replica, Router, Script, Setup, attention, view_of};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

async fn text(router: &Router) -> String {
    let answer = router.post("/v1/completions", r#"{"prompt":"x","seed":5}"#).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()["choices"][0]["text"].as_str().expect("text").to_owned()
}

#[tokio::test]
async fn another_replica_goes_on_where_one_broke() {
    let broken = Script::says("hello world").breaks_after(4, ErrorKind::Unavailable, 1);
    let replicas = vec![("a", "n1", broken), ("b", "n1", Script::says("hello world"))];
    let router = Setup { replicas, ..Setup::default() }.start().await;
    assert_eq!(text(&router).await, "hello world");
    let resumed = &router.replicas.get("b").requests()[0];
    let first = &router.replicas.get("a").requests()[0];
    assert_eq!(resumed.tokens, [&first.tokens[..], &ByteCodec::ids("hell")[..]].concat());
    assert_eq!((resumed.prompt_len, resumed.max_tokens, resumed.choice), (first.prompt_len, 16, 0));
    assert_eq!(resumed.sampling, first.sampling);
    assert!(resumed.budget_ms > 0 && resumed.budget_ms <= first.budget_ms);
    assert_eq!(router.metric("conclave_failovers_total"), 1.0);
}

#[tokio::test]
async fn the_only_replica_is_asked_again() {
    let router = Setup::with(Script::says("hello").breaks_after(2, ErrorKind::Unavailable, 2)).start().await;
    assert_eq!(text(&router).await, "hello");
    let sent = router.replicas.get("a").requests();
    assert_eq!(sent.iter().map(|request| request.tokens.len()).collect::<Vec<_>>(), [2, 4, 6]);
}

#[tokio::test]
async fn a_stream_that_ends_early_is_broken() {
    // `Cancelled` is what a replica's own end looks like; it is not one that another replica may hide.
    let router = Setup::with(Script::says("hello").breaks_after(2, ErrorKind::Cancelled, 1)).start().await;
    assert_eq!(router.post("/v1/completions", r#"{"prompt":"x"}"#).await.status, 499);
}

#[tokio::test]
async fn a_replica_that_is_full_is_passed_over() {
    let full = Script::default().refuses(ErrorKind::ResourceExhausted, usize::MAX);
    let replicas = vec![("a", "n1", full.clone()), ("b", "n1", Script::says("hi"))];
    let router = Setup { replicas, ..Setup::default() }.start().await;
    assert_eq!(text(&router).await, "hi");

    let router = Setup { replicas: vec![("a", "n1", full)], ..Setup::default() }.start().await;
    let answer = router.post("/v1/completions", r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!(answer.error().0, 429, "before the stream begins");
    assert_eq!(answer.header("retry-after"), Some("1"));
}

#[tokio::test]
async fn tries_are_bounded() {
    let config = FrontConfig { max_tries: 3, ..FrontConfig::default() };
    let script = Script::says("hello").breaks_after(0, ErrorKind::Unavailable, usize::MAX);
    let router = Setup { config, ..Setup::with(script) }.start().await;
    let (status, message, _, _) = router.post("/v1/completions", r#"{"prompt":"x"}"#).await.error();
    assert_eq!((status, message.as_str()), (503, "broken by the script"));
    assert_eq!(router.replicas.get("a").requests().len(), 3);
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_not_tried_elsewhere() {
    let refuses = Script::default().refuses(ErrorKind::InvalidArgument, usize::MAX);
    let replicas = vec![("a", "n1", refuses), ("b", "n1", Script::says("hi"))];
    let router = Setup { replicas, ..Setup::default() }.start().await;
    assert_eq!(router.post("/v1/completions", r#"{"prompt":"x"}"#).await.error().0, 400);
    assert!(router.replicas.get("b").requests().is_empty());
}

#[tokio::test]
async fn a_broken_sequence_waits_for_a_replica() {
    let broken = Script::says("hello").breaks_after(3, ErrorKind::Unavailable, 1);
    let replicas = vec![("a", "n1", broken), ("b", "n2", Script::says("hello"))];
    let router = Setup { replicas, ..Setup::default() }.start().await;
    // `a` leaves for good with its stream; `b` of another numerics id comes later.
    router.view.send_replace(view_of(vec![attention("a", "n1")]));
    let request = router.begin("/v1/completions", r#"{"prompt":"x"}"#).await;
    let replica = router.replicas.get("a").clone();
    support::eventually("a broke", || replica.broken.load(Ordering::SeqCst) > 0).await;
    router.view.send_replace(view_of(Vec::new()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    router.view.send_replace(view_of(vec![attention("b", "n2")]));
    let answer = request.answer().await.json();
    assert_eq!(answer["choices"][0]["text"], "hello");
    let exact = router.replicas.get("b").requests().is_empty();
    assert_eq!(answer["choices"][0]["conclave"]["exact"], exact, "two numerics ids are not exact");
}

#[tokio::test]
async fn numerics_of_both_replicas_are_reported() {
    let broken = Script::says("hello").breaks_after(3, ErrorKind::Unavailable, 1);
    let replicas = vec![("a", "n1", broken), ("b", "n2", Script::says("hello"))];
    let router = Setup { replicas, ..Setup::default() }.start().await;
    let answer = router.post("/v1/completions", r#"{"prompt":"x"}"#).await.json();
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][0]["conclave"]["exact"]),
        (&json!("hello"), &json!(false))
    );
}

#[tokio::test]
async fn prompt_scores_come_once() {
    // The scores are the first event, so that the stream breaks right behind them.
    let broken = Script::says("hi").breaks_after(1, ErrorKind::Unavailable, 1);
    let replicas = vec![("a", "n1", broken), ("b", "n1", Script::says("hi"))];
    let router = Setup { replicas, ..Setup::default() }.start().await;
    let body = r#"{"prompt":"abc","echo":true,"logprobs":0,"max_tokens":2}"#;
    let answer = router.post("/v1/completions", body).await.json();
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!(["<bos>", "a", "b", "c", "h", "i"]));
}

#[tokio::test]
async fn a_replica_out_of_step_is_an_error() {
    let router = Setup::with(Script::says("hi").skewed(1)).start().await;
    let (status, message, _, _) = router.post("/v1/completions", r#"{"prompt":"x"}"#).await.error();
    assert_eq!((status, message.as_str()), (500, "attention sent a token at position 3, expected position 2"));
}

#[tokio::test]
async fn the_deadline_ends_a_sequence() {
    let config = FrontConfig { default_timeout: Duration::from_millis(200), ..FrontConfig::default() };
    let router = Setup { config, ..Setup::with(Script::says("hi").hangs()) }.start().await;
    let (status, message, _, code) = router.post("/v1/completions", r#"{"prompt":"x"}"#).await.error();
    assert_eq!((status, message.as_str()), (504, "deadline exceeded after 2 generated tokens"));
    assert_eq!(code.as_deref(), Some("deadline_exceeded"));
    assert_eq!(router.replicas.get("a").cancelled.load(Ordering::SeqCst), 1);
}

/// A scripted replica behind a real gRPC server.
struct Server(std::sync::Arc<Replica>);

#[tonic::async_trait]
impl Attention for Server {
    type GenerateStream = BoxStream<'static, Result<TokenEvent, Status>>;

    async fn generate(&self, request: Request<SequenceRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let instance = request.metadata().get("conclave-instance").and_then(|value| value.to_str().ok());
        assert_eq!(instance, Some("remote"));
        assert_eq!(request.metadata().get("conclave-fingerprint").map(|value| value.as_bytes()), Some(&b"f00d"[..]));
        Ok(Response::new(self.0.run(request.into_inner())?.map_err(Status::from).boxed()))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<conclave_proto::v1::AttentionStatus>, Status> {
        Err(Status::internal("none"))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unimplemented("none"))
    }
}

#[test]
fn a_lost_connection_is_unavailable() {
    let server_runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let listener = server_runtime.block_on(support::listener());
    let address = listener.local_addr().expect("bound");
    let replica = Replica::new(Script::says("hi").hangs());
    let service = AttentionServer::new(Server(replica.clone()));
    let incoming = TcpIncoming::from(listener);
    server_runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));

    let client_runtime = tokio::runtime::Runtime::new().expect("a runtime");
    client_runtime.block_on(async move {
        let member = conclave_cluster::Member { address: format!("http://{address}"), ..attention("remote", "n1") };
        let connector = GrpcAttention::new("f00d").expect("ASCII");
        let link = connector.connect(&member).await.expect("a server");
        let request = SequenceRequest { tokens: vec![5], prompt_len: 1, max_tokens: 9, ..SequenceRequest::default() };
        let mut events = link.generate(request).await.expect("taken");
        assert!(events.next().await.expect("an event").is_ok());
        assert!(events.next().await.expect("an event").is_ok());
        let status: Error = link.status().await.expect_err("the server says so");
        assert_eq!(status.kind, ErrorKind::Internal, "what the server says keeps its kind");

        server_runtime.shutdown_background();
        let error = events.next().await.expect("an event").expect_err("the server is gone");
        assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
        let error = connector.connect(&member).await.err().expect("nobody there");
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.message.starts_with(&format!("attention remote at http://{address}: ")), "{error}");
    });
}
