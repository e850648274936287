//! A router's end of a stream of layers, over both transports.

mod support;

use std::sync::Arc;
use std::time::Duration;

use conclave_cluster::{LocalMembership, Member, Membership, Registration, Role, SameHost};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, MoeLink, RemoteConfig, RemoteDispatch, serve_dispatch, serve_dispatch_streams,
};
use conclave_serve::same_host::{self, SameHost::Auto};
use support::{ALL, Cluster, Mood, expected, input, member};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Over {
    Grpc,
    Socket,
}

/// Serves a dispatcher until the token is cancelled; the router's record.
async fn serve(name: &str, over: Over, dispatcher: Arc<Dispatcher>, stop: CancellationToken) -> Member {
    let mut record = Member { role: Role::Router, hosts_dispatch: true, ..member(name, &[]) };
    match over {
        Over::Grpc => {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            record.address = format!("http://{}", listener.local_addr().unwrap());
            let server = Server::builder().add_service(serve_dispatch(dispatcher, stop, None));
            tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        }
        Over::Socket => {
            let (listener, socket) = same_host::listen(name).unwrap();
            record.same_host = Some(SameHost { host: Auto.host().unwrap(), socket });
            tokio::spawn(serve_dispatch_streams(dispatcher, name.to_owned(), listener, stop, None));
        }
    }
    record
}

async fn register(membership: &LocalMembership, record: Member) -> Box<dyn Registration> {
    membership.register(Arc::new(move |_| Ok(record.clone()))).await.unwrap()
}

#[tokio::test]
async fn a_router_that_stops_answers_what_is_under_way_and_takes_no_more() {
    for over in [Over::Grpc, Over::Socket] {
        let (first, second) = tokio::join!(
            Cluster::new(DispatchConfig::new("f"), &[("a", &ALL)]),
            Cluster::new(DispatchConfig::new("f"), &[("b", &ALL)])
        );
        let (membership, stop) = (LocalMembership::new("routers"), CancellationToken::new());
        let record = serve("r1", over, first.dispatcher.clone(), stop.clone()).await;
        let _first = register(&membership, record).await;
        let remote = RemoteDispatch::new(RemoteConfig { host: Auto.host(), ..RemoteConfig::new("f", 7) }, &membership);

        first.shard("a").set(Mood::Slow(Duration::from_millis(400)));
        let (under_way, later) = (input(1, 3), input(2, 3));
        let call = tokio::spawn({
            let (remote, input) = (remote.clone(), under_way.clone());
            async move { remote.moe(input).await }
        });
        while first.shard("a").calls() == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
        // Sent on the stream that is about to end, and repeated on the next router.
        let again = tokio::spawn({
            let (remote, input) = (remote.clone(), later.clone());
            async move { remote.moe(input).await }
        });
        let record = serve("r2", over, second.dispatcher.clone(), CancellationToken::new()).await;
        let _second = register(&membership, record).await;

        assert_eq!(call.await.unwrap().unwrap().routed, expected(&under_way).await.routed, "{over:?}");
        assert_eq!(again.await.unwrap().unwrap().routed, expected(&later).await.routed, "{over:?}");
        assert_eq!((first.shard("a").calls(), second.shard("b").calls()), (1, 1), "{over:?}");
    }
}
