//! Assembles the router's servers. The binary puts each on a runtime of its own choice.

use std::{fmt, future::Future, str::FromStr, sync::Arc, time::Duration};

use axum::serve::ListenerExt;
use conclave_proto::{
    DESCRIPTORS,
    v1::{dispatch_server::Dispatch, dispatch_server::DispatchServer, inference_server},
};
use conclave_serve::{Error, ErrorKind, Readiness, State, admin, flow};
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    api::{ApiKeys, grpc, openai},
    front::{ClusterLoad, Front},
};

/// A client or a peer whose host is gone is noticed after this and as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What a router process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// The public API.
    Front,
    /// MoE layers for attention replicas.
    Dispatch,
    /// Both.
    #[default]
    Both,
}

impl Role {
    /// Whether the public API is served.
    pub fn is_front(self) -> bool {
        self != Self::Dispatch
    }

    /// Whether attention replicas may send MoE layers.
    pub fn hosts_dispatch(self) -> bool {
        self != Self::Front
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "front" => Ok(Self::Front),
            "dispatch" => Ok(Self::Dispatch),
            "both" => Ok(Self::Both),
            other => {
                Err(Error::invalid(format!("role: found {other:?}, expected front, dispatch or both"))
                    .with_param("role"))
            }
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Front => "front",
            Self::Dispatch => "dispatch",
            Self::Both => "both",
        })
    }
}

/// The public API of a router.
#[derive(Clone)]
pub struct RouterService {
    /// Serves the requests.
    pub front: Arc<Front>,
    /// What the cluster view shows of experts.
    pub load: Arc<dyn ClusterLoad>,
    /// Who may call.
    pub keys: ApiKeys,
    /// Shown by `/readyz` and by the gRPC health service; kept by [`follow_readiness`].
    pub readiness: Readiness,
    /// Shown by `/metrics`.
    pub registry: Registry,
}

impl RouterService {
    /// The HTTP API with the admin endpoints.
    pub fn http(&self) -> axum::Router {
        let admin = admin::router(self.readiness.clone(), self.registry.clone());
        openai::router(self.front.clone(), self.keys.clone(), admin)
    }

    /// The gRPC API with health and reflection; a dispatch service may be added. To be called inside a runtime.
    ///
    /// # Errors
    /// When the built-in service descriptions cannot be read.
    pub fn grpc(&self) -> Result<Routes, Error> {
        let inference = grpc::server(self.front.clone(), self.load.clone(), self.keys.clone());
        let (reporter, health) = tonic_health::server::health_reporter();
        tokio::spawn(report_health(reporter, self.readiness.clone()));
        let broken = |e: tonic_reflection::server::Error| Error::new(ErrorKind::Internal, format!("reflection: {e}"));
        Ok(Routes::new(inference)
            .add_service(health)
            .add_service(reflection().build_v1().map_err(broken)?)
            .add_service(reflection().build_v1alpha().map_err(broken)?))
    }
}

/// The dispatch service alone.
pub fn dispatch_routes<T: Dispatch>(dispatch: DispatchServer<T>) -> Routes {
    Routes::new(dispatch)
}

/// Serves gRPC until `stop`; calls under way get `grace` to end.
///
/// # Errors
/// When the listener breaks.
pub async fn serve_grpc(
    listener: TcpListener,
    routes: Routes,
    stop: CancellationToken,
    grace: Duration,
) -> Result<(), Error> {
    serve_on(Server::builder(), listener, routes, (stop, grace)).await
}

/// Serves gRPC for other members until `stop`; calls under way get `grace` to end.
///
/// # Errors
/// When the listener breaks.
pub async fn serve_members(
    listener: TcpListener,
    routes: Routes,
    stop: CancellationToken,
    grace: Duration,
) -> Result<(), Error> {
    serve_on(flow::member_server(), listener, routes, (stop, grace)).await
}

async fn serve_on(
    server: Server,
    listener: TcpListener,
    routes: Routes,
    (stop, grace): (CancellationToken, Duration),
) -> Result<(), Error> {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = server
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    let broken = |e| Error::new(ErrorKind::Internal, format!("gRPC server: {e}"));
    until(async { server.await.map_err(broken) }, stop, grace).await
}

/// Serves HTTP until `stop`; requests under way get `grace` to end.
///
/// # Errors
/// When the listener breaks.
pub async fn serve_http(
    listener: TcpListener,
    router: axum::Router,
    stop: CancellationToken,
    grace: Duration,
) -> Result<(), Error> {
    // A delayed packet costs a token's time at most; the connection works without.
    let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
    let server = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
    let broken = |e| Error::new(ErrorKind::Internal, format!("HTTP server: {e}"));
    until(async { server.await.map_err(broken) }, stop, grace).await
}

/// Keeps `readiness` as the front's view of the cluster says, until `stop`. When the view ends before, the process
/// cannot go on.
pub async fn follow_readiness(front: Arc<Front>, readiness: Readiness, stop: CancellationToken) {
    let mut changes = front.changes();
    loop {
        changes.mark_unchanged();
        readiness.set(match (front.readiness(), readiness.state()) {
            (Ok(()), _) => State::Ready,
            (Err(missing), State::Starting(_)) => State::Starting(missing),
            (Err(missing), _) => State::Waiting(missing),
        });
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() {
                readiness.set(State::Failed("the membership watch ended".to_owned()));
                return;
            },
        }
    }
}

async fn until(
    server: impl Future<Output = Result<(), Error>>,
    stop: CancellationToken,
    grace: Duration,
) -> Result<(), Error> {
    let over = async {
        stop.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        ended = server => ended,
        () = over => Ok(()),
    }
}

async fn report_health(reporter: HealthReporter, readiness: Readiness) {
    let mut states = readiness.watch();
    // The watch must see the end of all handles, this one included.
    drop(readiness);
    loop {
        let ready = *states.borrow_and_update() == State::Ready;
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", inference_server::SERVICE_NAME] {
            reporter.set_service_status(service, status).await;
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_as_they_are_shown() {
        for (role, front, dispatch) in
            [(Role::Front, true, false), (Role::Dispatch, false, true), (Role::Both, true, true)]
        {
            assert_eq!(role.to_string().parse(), Ok(role));
            assert_eq!((role.is_front(), role.hosts_dispatch()), (front, dispatch));
        }
        let error = "moe".parse::<Role>().expect_err("no role");
        assert_eq!(error.message, "role: found \"moe\", expected front, dispatch or both");
    }
}
