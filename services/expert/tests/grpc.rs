//! Shards, a router's dispatch and attention's side of it over loopback.

mod support;

use std::sync::Arc;
use std::time::Duration;

use conclave_cluster::{LocalMembership, Member, Role};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, LinkError, ModelShape, MoeLink, RemoteConfig, RemoteDispatch, RemoteShards,
    ShardConnector, serve_dispatch,
};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::{Dtype, Reference};
use conclave_model::Checkpoint;
use conclave_proto::v1::dispatch_client::DispatchClient;
use conclave_proto::v1::expert_client::ExpertClient;
use conclave_proto::v1::{DrainRequest, LoadCellsRequest, StatusRequest, UnloadCellsRequest, WorkErrorKind};
use conclave_serve::ErrorKind;
use futures::future::join_all;
use prometheus::Registry;
use support::{ALL, batch, cells, checkpoint, dispatch, input, member, reference, register, start};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

const TIMEOUT: Duration = Duration::from_secs(5);

/// A server on a free port, on a runtime of its own, so that it can end as abruptly as a killed process.
struct Running {
    address: String,
    runtime: Option<Runtime>,
}

impl Running {
    fn kill(&mut self) {
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn run<F>(serve: impl FnOnce(TcpListenerStream) -> F + Send + 'static) -> Running
where
    F: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        serve(TcpListenerStream::new(listener)).await.unwrap();
    });
    Running { address, runtime: Some(runtime) }
}

fn serve_shard(service: &Arc<ExpertService<Reference>>) -> Running {
    let server = service.grpc_server();
    run(move |incoming| Server::builder().add_service(server).serve_with_incoming(incoming))
}

fn serve_router(dispatcher: Arc<Dispatcher>) -> Running {
    run(move |incoming| {
        Server::builder()
            .add_service(serve_dispatch(dispatcher, CancellationToken::new(), None))
            .serve_with_incoming(incoming)
    })
}

fn dispatcher(checkpoint: &Checkpoint, membership: &LocalMembership) -> Arc<Dispatcher> {
    Dispatcher::new(
        DispatchConfig::new(checkpoint.fingerprint()),
        ModelShape::new(checkpoint).unwrap().unwrap(),
        membership,
        Arc::new(RemoteShards::new(checkpoint.fingerprint(), TIMEOUT, None)),
        &Registry::new(),
    )
}

fn router(name: &str, address: &str) -> Member {
    Member { role: Role::Router, hosts_dispatch: true, cells: Vec::new(), ..member(name, address, &[], "") }
}

#[tokio::test]
async fn the_wire_changes_no_bit_and_a_lost_router_or_shard_loses_nothing() {
    let (_dir, checkpoint) = checkpoint();
    let membership = LocalMembership::new("test");
    let mut registrations = Vec::new();
    let mut shards = Vec::new();
    for (name, groups) in [("a", &ALL[..4]), ("b", &ALL[4..]), ("c", &ALL[..4]), ("d", &ALL[4..])] {
        let service = start(ExpertConfig::new(name), reference(), &checkpoint, groups);
        let running = serve_shard(&service);
        let record = member(name, &running.address, groups, checkpoint.fingerprint());
        registrations.push(register(&membership, record).await);
        shards.push((service, running));
    }
    let mut routers = Vec::new();
    for name in ["r1", "r2"] {
        let running = serve_router(dispatcher(&checkpoint, &membership));
        registrations.push(register(&membership, router(name, &running.address)).await);
        routers.push(running);
    }
    let remote = RemoteDispatch::new(RemoteConfig::new(checkpoint.fingerprint(), 7), &membership);

    let check = async |seed: u64| {
        let input = input(Dtype::F32, seed, 5);
        let output = tokio::time::timeout(TIMEOUT * 4, remote.moe(input.clone())).await.unwrap().unwrap();
        let local = dispatch(&reference(), &checkpoint, &[ALL.to_vec()], input).await;
        assert_eq!(output.routed, local.routed, "seed {seed}");
    };
    join_all((0..8).map(&check)).await;
    shards[0].1.kill();
    shards[1].1.kill();
    join_all((10..18).map(&check)).await;
    routers[0].kill();
    join_all((20..24).map(&check)).await;
    routers[1].kill();
    let replacement = serve_router(dispatcher(&checkpoint, &membership));
    registrations.push(register(&membership, router("r3", &replacement.address)).await);
    join_all((30..34).map(&check)).await;
}

#[tokio::test]
async fn a_handshake_with_somebody_else_is_refused() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &ALL);
    let mut running = serve_shard(&service);
    let address = running.address.clone();
    let connect = async |fingerprint: &str, name: &str| {
        RemoteShards::new(fingerprint, TIMEOUT, None).connect(&member(name, &address, &ALL, "")).await
    };
    let link = connect(checkpoint.fingerprint(), "a").await.unwrap();
    assert!(link.compute(batch(Dtype::F32, 1, 2, 0)).await.unwrap().error.is_none());
    let error = connect(checkpoint.fingerprint(), "b").await.err().unwrap();
    let expected = "shard b: refused: conclave-instance: found \"b\", expected \"a\"";
    assert_eq!(error.to_string(), expected);
    let error = connect("another", "a").await.err().unwrap();
    assert!(matches!(error, LinkError::Refused { .. }), "{error}");
    running.kill();
    let error = connect(checkpoint.fingerprint(), "a").await.err().unwrap();
    assert!(matches!(error, LinkError::Lost { .. }), "{error}");

    let membership = LocalMembership::new("test");
    let router = serve_router(dispatcher(&checkpoint, &membership));
    let mut client = DispatchClient::connect(router.address.clone()).await.unwrap();
    let status = client.moe(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");
}

#[tokio::test]
async fn errors_keep_their_kind_over_the_wire() {
    let (_dir, checkpoint) = checkpoint();
    let membership = LocalMembership::new("test");
    let running = serve_router(dispatcher(&checkpoint, &membership));
    let _registration = register(&membership, router("r", &running.address)).await;
    let remote = RemoteDispatch::new(RemoteConfig::new(checkpoint.fingerprint(), 7), &membership);
    let mut malformed = input(Dtype::F32, 1, 2);
    malformed.hidden = 5;
    let error = remote.moe(malformed).await.unwrap_err();
    assert_eq!((error.kind, &*error.message), (ErrorKind::InvalidArgument, "moe input: hidden: found 5, expected 32"));
    let mut hurried = input(Dtype::F32, 1, 2);
    hurried.budget_us = 300_000;
    let error = remote.moe(hurried).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Unavailable | ErrorKind::DeadlineExceeded), "{error}");

    let nobody = RemoteDispatch::new(
        RemoteConfig { no_router_timeout: Duration::from_millis(50), ..RemoteConfig::new("f", 7) },
        &LocalMembership::new("empty"),
    );
    let error = nobody.moe(input(Dtype::F32, 1, 2)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.starts_with("no router that hosts dispatch within "), "{error}");
}

#[tokio::test]
async fn a_shard_is_managed_over_grpc() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &[0]);
    let running = serve_shard(&service);
    let mut client = ExpertClient::connect(running.address.clone()).await.unwrap();
    let wire = |groups: &[u32]| cells(groups).into_iter().map(Into::into).collect::<Vec<conclave_proto::v1::Cell>>();
    let loaded = client.load_cells(LoadCellsRequest { cells: wire(&[3]) }).await.unwrap().into_inner();
    assert_eq!(loaded.held, wire(&[0, 3]));
    let status = client.load_cells(LoadCellsRequest { cells: wire(&[30]) }).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    let left = client.unload_cells(UnloadCellsRequest { cells: wire(&[0]) }).await.unwrap().into_inner();
    assert_eq!(left.held, wire(&[3]));
    let status = client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((&*status.instance, &*status.state, &*status.numerics), ("a", "ready", "reference-1"));
    assert_eq!(status.fingerprint, checkpoint.fingerprint());
    client.drain(DrainRequest {}).await.unwrap();
    let link = RemoteShards::new(checkpoint.fingerprint(), TIMEOUT, None)
        .connect(&member("a", &running.address, &[3], ""))
        .await
        .unwrap();
    let result = link.compute(batch(Dtype::F32, 1, 2, 3)).await.unwrap();
    assert_eq!(result.error.unwrap().kind(), WorkErrorKind::Leaving);
}

#[tokio::test]
async fn work_that_waits_is_not_forgotten_and_its_caller_is_told() {
    let (_dir, checkpoint) = checkpoint();
    let config = ExpertConfig { sign_every: Duration::from_millis(5), queue_rows: 1 << 20, ..ExpertConfig::new("a") };
    let service = start(config, reference(), &checkpoint, &ALL);
    let running = serve_shard(&service);
    let record = member("a", &running.address, &ALL, "");
    let link = RemoteShards::new(checkpoint.fingerprint(), TIMEOUT, None).connect(&record).await.unwrap();
    support::a_queued_batch_gets_signs_of_life(link).await;
}
