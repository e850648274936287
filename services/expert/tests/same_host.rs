//! Shards, a router's dispatch and attention's side of it over the sockets of members of one host.

mod support;

use std::sync::Arc;
use std::time::Duration;

use conclave_cluster::{LocalMembership, Member, Role, SameHost};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, LinkError, ModelShape, MoeLink, RemoteConfig, RemoteDispatch, RemoteShards,
    ShardConnector, Transport, serve_dispatch_streams,
};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::{Dtype, Reference};
use conclave_model::Checkpoint;
use conclave_serve::same_host::{self, SameHost::Auto};
use futures::future::join_all;
use prometheus::Registry;
use support::{ALL, batch, checkpoint, dispatch, input, member, reference, register, start};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const TIMEOUT: Duration = Duration::from_secs(5);
/// Nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:1";

/// A server on a runtime of its own, so that it can end as abruptly as a killed process.
struct Running {
    socket: String,
    stop: CancellationToken,
    runtime: Option<Runtime>,
}

impl Running {
    fn kill(&mut self) {
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }

    fn on(&self, record: Member) -> Member {
        let same_host = Some(SameHost { host: Auto.host().unwrap(), socket: self.socket.clone() });
        Member { same_host, ..record }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn run<F>(name: &str, serve: impl FnOnce(UnixListener, CancellationToken) -> F) -> Running
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let stop = CancellationToken::new();
    let _inside = runtime.enter();
    let (listener, socket) = same_host::listen(name).unwrap();
    runtime.spawn(serve(listener, stop.clone()));
    Running { socket, stop, runtime: Some(runtime) }
}

fn serve_shard(name: &str, service: &Arc<ExpertService<Reference>>) -> Running {
    run(name, |listener, stop| service.clone().serve_streams(listener, stop))
}

fn serve_router(name: &str, dispatcher: Arc<Dispatcher>) -> Running {
    run(name, |listener, stop| serve_dispatch_streams(dispatcher, name.to_owned(), listener, stop, None))
}

fn shards(checkpoint: &Checkpoint) -> RemoteShards {
    RemoteShards::new(checkpoint.fingerprint(), TIMEOUT, Auto.host())
}

fn dispatcher(checkpoint: &Checkpoint, membership: &LocalMembership) -> Arc<Dispatcher> {
    Dispatcher::new(
        DispatchConfig::new(checkpoint.fingerprint()),
        ModelShape::new(checkpoint).unwrap().unwrap(),
        membership,
        Arc::new(shards(checkpoint)),
        &Registry::new(),
    )
}

fn router(name: &str, running: &Running) -> Member {
    let record = member(name, NOWHERE, &[], "");
    running.on(Member { role: Role::Router, hosts_dispatch: true, ..record })
}

#[tokio::test]
async fn the_socket_changes_no_bit_and_a_lost_router_or_shard_loses_nothing() {
    let (_dir, checkpoint) = checkpoint();
    let membership = LocalMembership::new("test");
    let (mut registrations, mut shards, mut routers) = (Vec::new(), Vec::new(), Vec::new());
    for (name, groups) in [("a", &ALL[..4]), ("b", &ALL[4..]), ("c", &ALL[..4]), ("d", &ALL[4..])] {
        let service = start(ExpertConfig::new(name), reference(), &checkpoint, groups);
        let running = serve_shard(name, &service);
        let record = running.on(member(name, NOWHERE, groups, checkpoint.fingerprint()));
        registrations.push(register(&membership, record).await);
        shards.push((service, running));
    }
    for name in ["r1", "r2"] {
        let running = serve_router(name, dispatcher(&checkpoint, &membership));
        registrations.push(register(&membership, router(name, &running)).await);
        routers.push(running);
    }
    let config = RemoteConfig { host: Auto.host(), ..RemoteConfig::new(checkpoint.fingerprint(), 7) };
    let remote = RemoteDispatch::new(config, &membership);

    let check = async |seed: u64, rows: usize| {
        let input = input(Dtype::F32, seed, rows);
        let output = tokio::time::timeout(TIMEOUT * 4, remote.moe(input.clone())).await.unwrap().unwrap();
        let local = dispatch(&reference(), &checkpoint, &[ALL.to_vec()], input).await;
        assert_eq!(output.routed, local.routed, "seed {seed}");
    };
    join_all((0..8).map(|seed| check(seed, 5))).await;
    // More than a socket takes at once.
    check(9, 3000).await;
    shards[0].1.kill();
    shards[1].1.kill();
    join_all((10..18).map(|seed| check(seed, 5))).await;
    routers[0].kill();
    join_all((20..24).map(|seed| check(seed, 5))).await;
    routers[1].stop.cancel();
    let replacement = serve_router("r3", dispatcher(&checkpoint, &membership));
    registrations.push(register(&membership, router("r3", &replacement)).await);
    join_all((30..34).map(|seed| check(seed, 5))).await;
}

#[tokio::test]
async fn a_handshake_with_somebody_else_is_refused_and_tcp_is_what_remains() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &ALL);
    let mut running = serve_shard("a", &service);
    let link = shards(&checkpoint).connect(&running.on(member("a", NOWHERE, &ALL, ""))).await.unwrap();
    assert_eq!(link.transport(), Transport::SameHost);
    assert!(link.compute(batch(Dtype::F32, 1, 2, 0)).await.unwrap().error.is_none());

    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", tcp.local_addr().unwrap());
    let server = tonic::transport::Server::builder().add_service(service.grpc_server());
    tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(tcp)));
    // Somebody else answers at this socket: the member itself is asked at its address, and says so too.
    let other = running.on(member("b", &address, &ALL, ""));
    let error = shards(&checkpoint).connect(&other).await.err().unwrap();
    assert!(matches!(error, LinkError::Refused { .. }), "{error}");

    let here = running.on(member("a", &address, &ALL, ""));
    running.kill();
    let link = shards(&checkpoint).connect(&here).await.unwrap();
    assert_eq!(link.transport(), Transport::Tcp, "the socket is gone");
    assert!(link.compute(batch(Dtype::F32, 2, 2, 0)).await.unwrap().error.is_none());
}

#[tokio::test]
async fn work_that_waits_is_not_forgotten_and_its_caller_is_told() {
    let (_dir, checkpoint) = checkpoint();
    let config = ExpertConfig { sign_every: Duration::from_millis(5), queue_rows: 1 << 20, ..ExpertConfig::new("a") };
    let service = start(config, reference(), &checkpoint, &ALL);
    let running = serve_shard("a", &service);
    let link = shards(&checkpoint).connect(&running.on(member("a", NOWHERE, &ALL, ""))).await.unwrap();
    support::a_queued_batch_gets_signs_of_life(link).await;
}

#[tokio::test]
async fn a_cancelled_batch_is_not_computed_and_what_was_taken_is_answered_before_the_end() {
    let (_dir, checkpoint) = checkpoint();
    // It is computed for much longer than the messages after it take to be read.
    const LARGE: usize = 1 << 16;
    let config = ExpertConfig { max_rows: LARGE, queue_rows: 2 * LARGE, ..ExpertConfig::new("a") };
    let service = start(config, reference(), &checkpoint, &ALL);
    let running = serve_shard("a", &service);
    let link = shards(&checkpoint).connect(&running.on(member("a", NOWHERE, &ALL, ""))).await.unwrap();
    let compute = |step, rows| {
        let link = link.clone();
        tokio::spawn(async move { link.compute(batch(Dtype::F32, step, rows, 0)).await })
    };
    let waiting = async |rows| {
        while service.status().queued_rows != rows {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let large = compute(1, LARGE);
    let dropped = compute(2, 1);
    tokio::time::timeout(TIMEOUT, waiting(1)).await.expect("one row waits while the others are computed");
    dropped.abort();
    // What is sent after a cancel is read after it.
    let last = compute(3, 1);
    tokio::time::timeout(TIMEOUT, waiting(2)).await.expect("another row waits");
    running.stop.cancel();
    for taken in [large, last] {
        assert!(taken.await.unwrap().unwrap().error.is_none(), "it was taken before");
    }
    let ended = async {
        while link.alive() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, ended).await.expect("the stream ends after its last answer");
    let pairs: u64 = service.status().cells.iter().map(|cell| cell.rows).sum();
    assert_eq!(pairs, LARGE as u64 + 1, "the cancelled row is not among them");
}
