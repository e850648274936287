//! The gRPC face: who is spoken to is checked first.

use crate::common::{Fixture, collect, prompt, request, start};
use conclave_proto::v1::attention_client::AttentionClient;
use conclave_proto::v1::{DrainRequest, SequenceRequest, StatusRequest, TokenEvent};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER};
use futures::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Server};
use tonic::{Code, Request};

async fn serve(fixture: &Fixture) -> AttentionClient<Channel> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    let server = Server::builder().add_service(fixture.service.grpc_server());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    AttentionClient::connect(address).await.expect("connects")
}

fn call(request: SequenceRequest, instance: &str, fingerprint: &str) -> Request<SequenceRequest> {
    let mut request = Request::new(request);
    request.metadata_mut().insert(INSTANCE_HEADER, instance.parse().expect("text"));
    request.metadata_mut().insert(FINGERPRINT_HEADER, fingerprint.parse().expect("text"));
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn generates_what_the_service_generates() {
    let fixture = start(|_| {});
    let mut client = serve(&fixture).await;
    let expected = collect(fixture.service.generate(request(prompt(1, 20))).expect("accepted")).await;
    let own = fixture.checkpoint.fingerprint().to_owned();
    let stream = client.generate(call(request(prompt(1, 20)), "attention-1", &own)).await.expect("accepted");
    let events: Vec<TokenEvent> = stream.into_inner().map(|event| event.expect("no error")).collect().await;
    assert_eq!(events.len(), expected.tokens.len() + 1);
    let status = client.status(StatusRequest {}).await.expect("answers").into_inner();
    assert_eq!((status.state.as_str(), status.instance.as_str()), ("ready", "attention-1"));
    assert_eq!((status.fingerprint, status.context_limit), (own, 1024));
    client.drain(DrainRequest {}).await.expect("drains");
    assert_eq!(client.status(StatusRequest {}).await.expect("answers").into_inner().state, "leaving");
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_callers_that_mean_somebody_else() {
    let fixture = start(|_| {});
    let mut client = serve(&fixture).await;
    let own = fixture.checkpoint.fingerprint().to_owned();
    let calls = [
        (call(request(vec![1]), "attention-2", &own), "attention-2"),
        (call(request(vec![1]), "attention-1", "beef"), "beef"),
        (Request::new(request(vec![1])), "nothing"),
    ];
    for (call, found) in calls {
        let status = client.generate(call).await.expect_err("refused");
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains(&format!("found {found}")), "{status}");
    }
    let wrong = client.generate(call(request(vec![]), "attention-1", &own)).await.expect_err("refused");
    assert_eq!(wrong.code(), Code::InvalidArgument);
}
