//! `conclave router`: the public API, dispatch, or both.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use conclave_cluster::{MakeMember, Member, MemberState, Membership, Role};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, ModelShape, RemoteShards,
    pair::{NoPair, Pairs},
    serve_dispatch, serve_dispatch_streams,
};
use conclave_model::Checkpoint;
use conclave_router::{
    Role as Part, RouterService, dispatch_routes,
    front::{ClusterLoad, Front, GrpcAttention, NoLoad, ServedModel},
};
use conclave_serve::{
    Lane, State, Stirrer, admin,
    args::{ClusterArgs, LogArgs},
    listen::{self, MemberListener},
    telemetry,
};
use futures::FutureExt;
use prometheus::Registry;
use tokio::{
    net::TcpListener,
    runtime::{Handle, Runtime},
};
use tokio_util::sync::CancellationToken;

use super::{
    FrontArgs, ModelArgs,
    connectors::DispatcherLoad,
    host::{self, Host, MemberService},
    member,
    range::{YEAR, range},
};

/// Run a router: the public API, dispatch of MoE layers to expert shards, or both.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  conclave router --model DIR --etcd http://127.0.0.1:2379\n  \
                        conclave router --model DIR --etcd http://127.0.0.1:2379 --role front --http 0.0.0.0:8000")]
pub struct RouterArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    front: FrontArgs,
    #[command(flatten)]
    log: LogArgs,
    /// Address of the dispatch service for attention replicas (what this router advertises).
    #[arg(long, env = "CONCLAVE_DISPATCH_ADDR", value_name = "ADDR", default_value = "127.0.0.1:0")]
    dispatch: String,
    /// What this router does.
    #[arg(long, env = "CONCLAVE_ROLE", value_name = "front|dispatch|both", default_value = "both")]
    role: Part,
    /// Threads that move a layer's rows, apart from those that tokenise and answer. One is quickest for a few attention
    /// replicas; many may need more.
    #[arg(long, env = "CONCLAVE_DISPATCH_THREADS", value_name = "N", default_value = "1")]
    dispatch_threads: usize,
    /// Longest time, in seconds, to finish what is under way when told to end.
    #[arg(long, env = "CONCLAVE_DRAIN_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = range::<u64>(0..=YEAR))]
    drain_timeout: u64,
}

/// Runs until told to end.
///
/// # Errors
/// Naming what could not be had: address, checkpoint, coordinator.
pub async fn run(args: RouterArgs) -> Result<()> {
    let instance = args.cluster.instance("router")?;
    let guard = telemetry::init(&args.log.telemetry("conclave-router", &instance))?;
    let dispatch = DispatchRuntime::start(args.dispatch_threads)?;
    let ended = live(&args, &instance, &dispatch).await;
    dispatch.end();
    guard.shutdown().await;
    ended
}

/// Dispatch has threads of its own, so that tokenising never delays a layer.
enum DispatchRuntime {
    /// One thread: no message waits for another thread to wake up.
    Lane(Arc<Lane>),
    /// Several.
    Threads(Runtime),
}

impl DispatchRuntime {
    fn start(threads: usize) -> Result<Self> {
        if !(1..=256).contains(&threads) {
            anyhow::bail!("--dispatch-threads: found {threads}, expected 1 to 256");
        }
        if threads == 1 {
            return Ok(Self::Lane(Lane::start("dispatch")?));
        }
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        Ok(Self::Threads(builder.worker_threads(threads).thread_name("dispatch").enable_all().build()?))
    }

    fn handle(&self) -> &Handle {
        match self {
            Self::Lane(lane) => lane.handle(),
            Self::Threads(runtime) => runtime.handle(),
        }
    }

    fn stirrer(&self) -> Option<Stirrer> {
        match self {
            Self::Lane(lane) => Some(lane.stirrer().clone()),
            Self::Threads(_) => None,
        }
    }

    fn end(self) {
        match self {
            Self::Lane(lane) => drop(lane),
            Self::Threads(runtime) => runtime.shutdown_background(),
        }
    }
}

async fn live(args: &RouterArgs, instance: &str, runtime: &DispatchRuntime) -> Result<()> {
    let mut host = Host::new("router", Duration::from_secs(args.drain_timeout))?;
    let keys = args.front.keys()?;
    let entrance = host.serve_entrance(listen::bind(&args.front.http).await?);
    let (public, dispatch) = bind(args, instance).await?;
    let (flag, listening) = match (&dispatch, &public) {
        (Some(dispatch), _) => ("--dispatch", dispatch.local_addr()?),
        (None, public) => ("--grpc", public.as_ref().context("a role that listens")?.local_addr()?),
    };
    let address = member::advertised(&args.cluster, flag, listening)?;
    let checkpoint = args.model.open().await?;
    let model = args.role.is_front().then(|| args.front.model(&checkpoint)).transpose()?;
    let Some(membership) = member::connect(&args.cluster, &host).await? else { return host.end().await };

    let here = args.cluster.same_host.host();
    let same_host = dispatch.as_ref().and_then(|listener| member::same_host(&args.cluster, listener));
    let dispatcher = match &dispatch {
        Some(_) => dispatcher(&checkpoint, here, &*membership, &host.registry)?,
        None => None,
    };
    if let (Some(listener), Some(dispatcher)) = (dispatch, &dispatcher) {
        let served = dispatch_service(instance, dispatcher, host.inner_close(), runtime.stirrer());
        host.serve_inner_members(runtime.handle(), listener, served)?;
    }
    let record = Member {
        hosts_dispatch: dispatcher.is_some(),
        same_host,
        ..member::record(instance, Role::Router, address, &checkpoint, String::new())
    };
    let make: MakeMember = Arc::new(move |_| Ok(record.clone()));
    let registration = membership.register(make).await?;
    match public.zip(model) {
        Some((grpc, model)) => {
            let (front, load) = front(args, model, &*membership, dispatcher, &host.registry)?;
            let (readiness, registry) = (host.readiness.clone(), host.registry.clone());
            host.serve_front(RouterService { front, load, keys, readiness, registry }, &entrance, grpc)?;
        }
        None => entrance.open(admin::router(host.readiness.clone(), host.registry.clone())),
    }
    registration.set_state(MemberState::Ready).await?;
    if !args.role.is_front() {
        host.readiness.set(State::Ready);
    }
    tracing::info!(instance, role = %args.role, "registered");

    host.stop.cancelled().await;
    let (readiness, limit) = (host.readiness.clone(), Duration::from_secs(args.drain_timeout) + host::SERVER_GRACE);
    host::leave(&readiness, &*registration, host.end_requests(), limit).await;
    host.end().await
}

/// Where the public API and dispatch listen, as far as this router has them.
async fn bind(args: &RouterArgs, instance: &str) -> Result<(Option<TcpListener>, Option<MemberListener>)> {
    let public = match args.role.is_front() {
        true => Some(listen::bind(&args.front.grpc).await?),
        false => None,
    };
    let near = member::near(&args.cluster).then_some(instance);
    let dispatch = match args.role.hosts_dispatch() {
        true => Some(MemberListener::bind(&args.dispatch, near).await?),
        false => None,
    };
    Ok((public, dispatch))
}

/// Dispatch for attention replicas.
pub fn dispatch_service(
    instance: &str,
    dispatcher: &Arc<Dispatcher>,
    stop: CancellationToken,
    stirrer: Option<Stirrer>,
) -> MemberService {
    let routes = dispatch_routes(serve_dispatch(dispatcher.clone(), stop, stirrer.clone()));
    let (instance, dispatcher) = (instance.to_owned(), dispatcher.clone());
    let streams = Arc::new(move |listener, stop| {
        serve_dispatch_streams(dispatcher.clone(), instance.clone(), listener, stop, stirrer.clone()).boxed()
    });
    MemberService { routes, streams }
}

/// `None` for a model without experts.
fn dispatcher(
    checkpoint: &Checkpoint,
    here: Option<String>,
    membership: &dyn Membership,
    registry: &Registry,
) -> Result<Option<Arc<Dispatcher>>> {
    let config = DispatchConfig::new(checkpoint.fingerprint());
    let without = Pairs::Without(NoPair::NoDevice("a router has none".to_owned()));
    let shards = RemoteShards::new(checkpoint.fingerprint(), config.connect_timeout, here).with_pairs(without);
    let (shards, shape) = (Arc::new(shards), ModelShape::new(checkpoint)?);
    Ok(shape.map(|shape| Dispatcher::new(config, shape, membership, shards, registry)))
}

/// The front, and what it shows of the experts' load.
fn front(
    args: &RouterArgs,
    model: ServedModel,
    membership: &dyn Membership,
    dispatcher: Option<Arc<Dispatcher>>,
    registry: &Registry,
) -> Result<(Arc<Front>, Arc<dyn ClusterLoad>)> {
    let connector = Arc::new(GrpcAttention::new(&model.fingerprint)?);
    let front = args.front.front(model, membership.watch(), connector, registry)?;
    let load: Arc<dyn ClusterLoad> = match dispatcher {
        Some(dispatcher) => Arc::new(DispatcherLoad(dispatcher)),
        None => Arc::new(NoLoad),
    };
    Ok((front, load))
}
