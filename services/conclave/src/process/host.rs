//! What every service process does around its service: signals, the admin page, the gRPC server, an orderly end.

use std::{fmt::Display, sync::Arc, time::Duration};

use anyhow::Result;
use clap::Args;
use conclave_cluster::{MemberState, Registration};
use conclave_router::{Entrance, RouterService};
use conclave_serve::{
    Error, ErrorKind, Readiness, State, admin,
    listen::{self, MemberListener},
    shutdown::{self, Signal},
};
use futures::future::BoxFuture;
use prometheus::Registry;
use tokio::{
    net::{TcpListener, UnixListener},
    runtime::Handle,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::range::{YEAR, range};

/// Longest wait for servers whose service has drained.
pub const SERVER_GRACE: Duration = Duration::from_millis(500);

/// Where an attention or expert process listens, and how it ends.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    /// Address of the gRPC server.
    #[arg(long, env = "CONCLAVE_GRPC", value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub grpc: String,
    /// Address of /livez, /readyz, /health and /metrics.
    #[arg(long, env = "CONCLAVE_ADMIN", value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub admin: String,
    /// Longest time, in seconds, to finish what is under way when told to end.
    #[arg(long, env = "CONCLAVE_DRAIN_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = range::<u64>(0..=YEAR))]
    pub drain_timeout: u64,
}

/// A process with its admin page served and its signals watched.
pub struct Host {
    /// Shown by the admin page.
    pub readiness: Readiness,
    /// Shown by the admin page.
    pub registry: Registry,
    /// Cancelled by the first SIGINT or SIGTERM.
    pub stop: CancellationToken,
    /// What calls under way get to end once their server is told to.
    grace: Duration,
    /// For clients and peers.
    outer: Servers,
    /// What the outer ones need: ends after them.
    inner: Servers,
}

/// Servers that end together.
#[derive(Default)]
struct Servers {
    close: CancellationToken,
    tasks: JoinSet<()>,
}

impl Servers {
    async fn end(&mut self, limit: Duration) {
        self.close.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(limit, all).await;
    }
}

impl Host {
    /// Watches signals.
    ///
    /// # Errors
    /// When signals cannot be handled or the process's own figures not be registered.
    pub fn new(service: &str, grace: Duration) -> Result<Self> {
        Ok(Self {
            readiness: Readiness::starting("opening the checkpoint"),
            registry: super::metrics::registry(service)?,
            stop: shutdown::on(shutdown::signals()?, |signal: Signal| shutdown::exit(signal)),
            grace,
            outer: Servers::default(),
            inner: Servers::default(),
        })
    }

    /// Serves the admin page from now on.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn serve_admin(&mut self, address: &str) -> Result<()> {
        let listener = listen::bind(address).await?;
        tracing::info!(address = %listener.local_addr()?, "admin page");
        let router = admin::router(self.readiness.clone(), self.registry.clone());
        let close = self.outer.close.clone();
        self.run("admin page", async move { admin::serve(listener, router, close).await });
        Ok(())
    }

    /// Serves gRPC from now on.
    pub fn serve_grpc(&mut self, listener: TcpListener, routes: Routes) {
        self.run("gRPC server", conclave_router::serve_grpc(listener, routes, self.outer.close.clone(), self.grace));
    }

    /// Cancelled when the requests of this process are done and the servers they needed may end.
    pub fn inner_close(&self) -> CancellationToken {
        self.inner.close.clone()
    }

    /// Serves other members on a runtime of its own.
    ///
    /// # Errors
    /// When a listener cannot be moved there.
    pub fn serve_members(&mut self, runtime: &Handle, listener: MemberListener, service: MemberService) -> Result<()> {
        let server = serve_members(runtime, listener, service, (self.outer.close.clone(), self.grace))?;
        self.run("gRPC server", server);
        Ok(())
    }

    /// The same, until the requests of this process are done.
    ///
    /// # Errors
    /// When a listener cannot be moved there.
    pub fn serve_inner_members(
        &mut self,
        runtime: &Handle,
        listener: MemberListener,
        service: MemberService,
    ) -> Result<()> {
        let server = serve_members(runtime, listener, service, (self.inner.close.clone(), SERVER_GRACE))?;
        let watched = self.watched("dispatch server", server);
        self.inner.tasks.spawn(watched);
        Ok(())
    }

    /// Serves the public HTTP address from now on, at first with nothing but the admin page.
    pub fn serve_entrance(&mut self, http: TcpListener) -> Entrance {
        let entrance = Entrance::new(self.readiness.clone(), self.registry.clone());
        let server = conclave_router::serve_http(http, entrance.router(), self.outer.close.clone(), self.grace);
        self.run("HTTP server", server);
        entrance
    }

    /// Serves the public API, and keeps readiness as its front says.
    ///
    /// # Errors
    /// When the service descriptions cannot be read.
    pub fn serve_front(&mut self, service: RouterService, entrance: &Entrance, grpc: TcpListener) -> Result<()> {
        self.serve_grpc(grpc, service.grpc()?);
        entrance.open(service.http());
        let (readiness, stop) = (self.readiness.clone(), self.stop.clone());
        tokio::spawn(conclave_router::follow_readiness(service.front, readiness, stop));
        Ok(())
    }

    fn run<E: Display>(&mut self, what: &'static str, server: impl Future<Output = Result<(), E>> + Send + 'static) {
        let watched = self.watched(what, server);
        self.outer.tasks.spawn(watched);
    }

    /// A server without which the process cannot go on.
    fn watched<E: Display>(
        &self,
        what: &'static str,
        server: impl Future<Output = Result<(), E>> + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (readiness, stop) = (self.readiness.clone(), self.stop.clone());
        async move {
            if let Err(error) = server.await {
                fail(&readiness, &stop, format!("{what}: {error}"));
            }
        }
    }

    /// Ends the servers for clients and peers, and waits until the requests under way are done.
    pub async fn end_requests(&mut self) {
        self.outer.end(self.grace + SERVER_GRACE).await;
    }

    /// Ends the servers and waits for them; fails if the process ended because it could not go on.
    pub async fn end(mut self) -> Result<()> {
        self.end_requests().await;
        self.inner.end(2 * SERVER_GRACE).await;
        match self.readiness.state() {
            State::Failed(reason) => anyhow::bail!(reason),
            _ => Ok(()),
        }
    }
}

/// What is served to other members: over gRPC, and over the socket for those of the same host.
#[derive(Clone)]
pub struct MemberService {
    /// Over gRPC.
    pub routes: Routes,
    /// Serves the socket until it is told to end, and what was taken until then is answered.
    pub streams: Arc<dyn Fn(UnixListener, CancellationToken) -> BoxFuture<'static, ()> + Send + Sync>,
}

/// Serves members on another runtime. `end`: when that ends, and what calls under way get then.
///
/// # Errors
/// When a listener cannot be moved there.
pub fn serve_members(
    runtime: &Handle,
    listener: MemberListener,
    service: MemberService,
    end: (CancellationToken, Duration),
) -> Result<impl Future<Output = Result<()>> + Send + 'static> {
    let moved = listener.moved()?;
    let (close, grace) = end;
    let server = runtime.spawn(async move {
        let MemberListener { tcp, same_host } = moved().map_err(|e| Error::new(ErrorKind::Internal, e.to_string()))?;
        let grpc = conclave_router::serve_members(tcp, service.routes, close.clone(), grace);
        let streams = async {
            let Some((socket, _)) = same_host else { return Ok(()) };
            let over = async {
                close.cancelled().await;
                tokio::time::sleep(grace).await;
            };
            tokio::select! {
                () = (service.streams)(socket, close.clone()) => Ok(()),
                () = over => Ok(()),
            }
        };
        tokio::try_join!(grpc, streams)
    });
    Ok(async move { server.await?.map(|_| ()).map_err(anyhow::Error::from) })
}

/// Marks the process as one that cannot go on and ends it in order.
pub fn fail(readiness: &Readiness, stop: &CancellationToken, reason: String) {
    tracing::error!(reason, "cannot go on");
    readiness.set(State::Failed(reason));
    stop.cancel();
}

/// What a member loads once its record stands; the record goes where that fails. `None`: the process was told to end before.
///
/// # Errors
/// Those of `load`.
pub async fn load_or_leave<T>(
    host: &Host,
    registration: &dyn Registration,
    load: impl Future<Output = Result<T>>,
) -> Result<Option<T>> {
    let loaded = tokio::select! {
        loaded = load => loaded.map(Some),
        () = host.stop.cancelled() => Ok(None),
    };
    if !matches!(loaded, Ok(Some(_)))
        && let Err(error) = registration.leave().await
    {
        tracing::warn!(%error, "the record of this member is left to its lease");
    }
    loaded
}

/// The end of a member's life: takes no new work, finishes what it has, then goes.
pub async fn leave(
    readiness: &Readiness,
    registration: &dyn Registration,
    drain: impl Future<Output = ()>,
    limit: Duration,
) {
    readiness.set(State::Draining("told to end".to_owned()));
    let told = registration.set_state(MemberState::Leaving).await;
    if let Err(error) = &told {
        tracing::warn!(%error, "could not tell the cluster that this member is leaving; its record is left to its lease");
    }
    if tokio::time::timeout(limit, drain).await.is_err() {
        tracing::warn!(?limit, "work was still under way at the end of the drain");
    }
    if told.is_ok()
        && let Err(error) = registration.leave().await
    {
        tracing::warn!(%error, "the record of this member is left to its lease");
    }
}
