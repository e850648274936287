//! The gRPC API against a real server.

mod support;

use conclave_proto::{
    CellId, GroupId,
    v1::{
        self, Chat, FinishReason, GenerateRequest, Message, Prompt, TokenIds, generate_event::Event,
        inference_client::InferenceClient, prompt,
    },
};
use conclave_router::ApiKeys;
use futures::TryStreamExt;
use support::{ByteCodec, FINGERPRINT, Router, Script, Setup, attention};
use tonic::{Code, Request, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

async fn client(router: &Router) -> InferenceClient<Channel> {
    InferenceClient::connect(router.grpc.clone()).await.expect("a server").max_encoding_message_size(64 << 20)
}

fn text(text: &str) -> Option<Prompt> {
    Some(Prompt { prompt: Some(prompt::Prompt::Text(text.to_owned())) })
}

fn ids(ids: &[u32]) -> Option<Prompt> {
    Some(Prompt { prompt: Some(prompt::Prompt::Tokens(TokenIds { ids: ids.to_vec() })) })
}

async fn events(router: &Router, request: GenerateRequest) -> Vec<(u32, Event)> {
    let events = client(router).await.generate(request).await.expect("taken").into_inner();
    events.map_ok(|event| (event.choice, event.event.expect("an event"))).try_collect().await.expect("no error")
}

#[tokio::test]
async fn a_stream_begins_with_what_it_was_resolved_to() {
    let router = Setup::default().start().await;
    let request = GenerateRequest { prompt: text("hi"), choices: 2, logprobs: Some(1), ..GenerateRequest::default() };
    let events = events(&router, request).await;
    let (0, Event::Started(started)) = &events[0] else { panic!("{:?}", events[0]) };
    assert_eq!(started.prompt_tokens, [&[0][..], &ByteCodec::ids("hi")].concat());
    assert_eq!((started.model.as_str(), started.request_id.len()), ("tiny", 32));
    assert_eq!(router.replicas.get("a").requests()[1].sampling.clone().expect("there").seed, started.seed);
    for choice in 0..2 {
        let of: Vec<&Event> =
            events[1..].iter().filter(|(index, _)| *index == choice).map(|(_, event)| event).collect();
        let text: String =
            of.iter().map(|event| if let Event::Delta(delta) = event { &*delta.text } else { "" }).collect();
        assert_eq!(text, "hello world");
        let Event::Delta(first) = of[0] else { panic!("{:?}", of[0]) };
        assert_eq!((first.tokens[0].position, first.tokens[0].logprob, first.tokens[0].top.len()), (3, Some(-1.06), 1));
        let Some(Event::Finished(last)) = of.last() else { panic!("{of:?}") };
        assert_eq!((last.reason(), last.stop_token, last.exact), (FinishReason::Stop, Some(1), true));
        let usage = last.usage.expect("usage");
        assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens), (3, 11, 3));
    }
}

#[tokio::test]
async fn text_waits_for_a_forming_stop_string() {
    let router = Setup::with(Script::says("abcd")).start().await;
    let stop = vec!["bd".to_owned(), "cd".to_owned()];
    let request = GenerateRequest { prompt: text("x"), stop, ..GenerateRequest::default() };
    let events = events(&router, request).await;
    let pieces: Vec<&str> = events
        .iter()
        .filter_map(|(_, event)| if let Event::Delta(delta) = event { Some(&*delta.text) } else { None })
        .collect();
    assert_eq!(pieces, ["a", "", "b", ""]);
    let Some((_, Event::Finished(last))) = events.last() else { panic!("{events:?}") };
    assert_eq!((last.stop.as_deref(), last.usage.expect("usage").completion_tokens), (Some("cd"), 4));
}

#[tokio::test]
async fn prompts_are_scored() {
    let router = Setup::default().start().await;
    let prompts = vec![text("ab").expect("a prompt"), ids(&[7]).expect("a prompt")];
    let request = v1::ScoreRequest { model: String::new(), prompts, top: 2 };
    let scored = client(&router).await.score(request).await.expect("scored").into_inner().prompts;
    let tokens: Vec<_> = scored[0].tokens.iter().map(|t| (t.token, t.position, t.logprob, t.top.len())).collect();
    assert_eq!(tokens, [(0, 0, None, 0), (99, 1, Some(-0.99), 2), (100, 2, Some(-1.0), 2)]);
    assert_eq!(scored[1].tokens.len(), 1);
    let none = client(&router).await.score(v1::ScoreRequest::default()).await.expect_err("no prompts");
    assert_eq!(
        (none.code(), none.message()),
        (Code::InvalidArgument, "prompts: found 0 prompts, expected 1 to 1024 prompts")
    );
}

#[tokio::test]
async fn text_becomes_tokens_and_text_again() {
    let router = Setup::default().start().await;
    let mut client = client(&router).await;
    let message = Message { role: "user".to_owned(), content: "é".to_owned() };
    let chat = Prompt { prompt: Some(prompt::Prompt::Chat(Chat { messages: vec![message] })) };
    let request = v1::TokenizeRequest { model: "tiny".to_owned(), prompt: Some(chat) };
    let tokens = client.tokenize(request).await.expect("tokenised").into_inner();
    assert_eq!(tokens.pieces[..2], ["<bos>", "u"]);
    let request = v1::DetokenizeRequest { model: String::new(), ids: tokens.ids };
    assert_eq!(client.detokenize(request).await.expect("detokenised").into_inner().text, "user: é\n");
    let request = v1::DetokenizeRequest { model: String::new(), ids: vec![999] };
    let error = client.detokenize(request).await.expect_err("no such id");
    assert_eq!(
        (error.code(), error.message()),
        (Code::InvalidArgument, "ids: found token id 999, expected ids below 300")
    );
}

#[tokio::test]
async fn the_model_and_the_cluster_are_shown() {
    let router = Setup::default().start().await;
    let mut client = client(&router).await;
    let model = client.get_model(v1::GetModelRequest {}).await.expect("shown").into_inner();
    assert_eq!(
        (model.id.as_str(), model.fingerprint.as_str(), model.architecture.as_str()),
        ("tiny", FINGERPRINT, "deepseek_v2")
    );
    assert_eq!(
        (model.context_limit, model.vocab, model.has_tokenizer, model.numerics.as_str()),
        (1000, 300, true, "n1")
    );

    let expert = conclave_cluster::Member {
        role: conclave_cluster::Role::Expert,
        cells: vec![CellId { span: 0, group: GroupId(3) }],
        ..attention("e", "n1")
    };
    router.view.send_replace(support::view_of(vec![attention("a", "n1"), expert]));
    let cluster = client.get_cluster(v1::GetClusterRequest {}).await.expect("shown").into_inner();
    assert_eq!((cluster.name.as_str(), cluster.coordinator_reachable), ("test", true));
    let members: Vec<_> = cluster
        .members
        .iter()
        .map(|m| (m.instance.as_str(), m.role.as_str(), m.state.as_str(), m.load, m.health.as_str()))
        .collect();
    assert_eq!(members, [("a", "attention", "ready", 7, "ok"), ("e", "expert", "ready", 0, "unknown")]);
    assert_eq!(cluster.cells.len(), 1);
    assert_eq!(
        (cluster.cells[0].cell, &cluster.cells[0].instances[..]),
        (Some(v1::Cell { group: 3, span: 0 }), &["e".to_owned()][..])
    );
}

#[tokio::test]
async fn wrong_requests_are_refused() {
    let router = Setup::default().start().await;
    let mut client = client(&router).await;
    let large = "x".repeat(10_000_000);
    for (request, code, message) in [
        (
            GenerateRequest::default(),
            Code::InvalidArgument,
            "prompt: found nothing, expected a text, a chat or token ids",
        ),
        (
            GenerateRequest { prompt: text(""), ..Default::default() },
            Code::InvalidArgument,
            "prompt: found an empty text, expected at least one character",
        ),
        (
            GenerateRequest { prompt: text(&large), ..Default::default() },
            Code::InvalidArgument,
            "prompt: found 10000000 bytes of text, expected at most 4194304",
        ),
        (
            GenerateRequest { prompt: ids(&[300]), ..Default::default() },
            Code::InvalidArgument,
            "prompt: found token id 300, expected ids below 300",
        ),
        (
            GenerateRequest { prompt: text("x"), choices: 129, ..Default::default() },
            Code::InvalidArgument,
            "choices: found 129, expected at most 128",
        ),
        (
            GenerateRequest { prompt: text("x"), timeout_ms: 9_999_999, ..Default::default() },
            Code::InvalidArgument,
            "timeout_ms: found 9999999, expected at most 3600000",
        ),
        (
            GenerateRequest { model: "big".to_owned(), prompt: text("x"), ..Default::default() },
            Code::NotFound,
            "model \"big\" is not served here, expected \"tiny\"",
        ),
    ] {
        let error = client.generate(request).await.expect_err("refused");
        assert_eq!((error.code(), error.message()), (code, message));
    }
    let hot = v1::SamplingOptions { temperature: Some(f32::NAN), ..Default::default() };
    let request = GenerateRequest { prompt: text("x"), sampling: Some(hot), ..Default::default() };
    assert_eq!(
        client.generate(request).await.expect_err("refused").message(),
        "temperature: found NaN, expected 0 to 2"
    );
    assert_eq!(router.metric("conclave_requests_total{endpoint=\"Generate\",status=\"InvalidArgument\"}"), 7.0);
}

#[tokio::test]
async fn keys_health_and_reflection() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("keys"), "sk-test").expect("written");
    let keys = ApiKeys::load(&dir.path().join("keys")).expect("a key");
    let router = Setup { keys, ..Setup::default() }.start().await;
    let mut inference = client(&router).await;
    assert_eq!(inference.get_model(v1::GetModelRequest {}).await.expect_err("no key").code(), Code::Unauthenticated);
    let mut request = Request::new(v1::GetModelRequest {});
    request.metadata_mut().insert("authorization", "Bearer sk-test".parse().expect("ASCII"));
    assert!(inference.get_model(request).await.is_ok());

    let channel = Channel::from_shared(router.grpc.clone()).expect("an address").connect().await.expect("a server");
    let mut health = HealthClient::new(channel.clone());
    let ask = HealthCheckRequest { service: "conclave.v1.Inference".to_owned() };
    let mut states = health.watch(ask).await.expect("known").into_inner();
    let mut state = async || states.try_next().await.expect("no error").expect("a state").status;
    while state().await != 1 {}
    router.view.send_replace(support::view_of(Vec::new()));
    assert_eq!(state().await, 2, "not serving without attention");

    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let answers = ServerReflectionClient::new(channel).server_reflection_info(futures::stream::iter([request])).await;
    let answer = answers.expect("there").into_inner().try_next().await.expect("no error").expect("an answer");
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
    assert!(
        names.contains(&"conclave.v1.Inference".to_owned()) && names.contains(&"grpc.health.v1.Health".to_owned()),
        "{names:?}"
    );
}
