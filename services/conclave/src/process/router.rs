//! `conclave router`: the public API, dispatch, or both.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use conclave_cluster::{MakeMember, Member, MemberState, Membership, Role};
use conclave_dispatch::{DispatchConfig, Dispatcher, GrpcShards, ModelShape, serve_dispatch};
use conclave_model::Checkpoint;
use conclave_router::{
    Role as Part, RouterService, dispatch_routes,
    front::{ClusterLoad, GrpcAttention, NoLoad},
};
use conclave_serve::{
    args::{ClusterArgs, LogArgs},
    listen, telemetry,
};
use prometheus::Registry;
use tokio::{net::TcpListener, runtime::Runtime};

use super::{
    FrontArgs, ModelArgs,
    connectors::DispatcherLoad,
    host::{self, Host},
    member,
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
    /// Threads that move a layer's rows, apart from those that tokenise and answer.
    #[arg(long, env = "CONCLAVE_DISPATCH_THREADS", value_name = "N", default_value = "2")]
    dispatch_threads: usize,
    /// Longest time, in seconds, to finish what is under way when told to end.
    #[arg(long, env = "CONCLAVE_DRAIN_TIMEOUT", value_name = "SECONDS", default_value = "30")]
    drain_timeout: u64,
}

/// Runs until told to end.
///
/// # Errors
/// Naming what could not be had: address, checkpoint, coordinator.
pub async fn run(args: RouterArgs) -> Result<()> {
    let instance = args.cluster.instance("router")?;
    let guard = telemetry::init(&args.log.telemetry("conclave-router", &instance))?;
    let dispatch = dispatch_runtime(args.dispatch_threads)?;
    let ended = live(&args, &instance, &dispatch).await;
    dispatch.shutdown_background();
    guard.shutdown().await;
    ended
}

/// Dispatch has threads of its own, so that tokenising never delays a layer.
fn dispatch_runtime(threads: usize) -> Result<Runtime> {
    if !(1..=256).contains(&threads) {
        anyhow::bail!("--dispatch-threads: found {threads}, expected 1 to 256");
    }
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(builder.worker_threads(threads).thread_name("dispatch").enable_all().build()?)
}

async fn live(args: &RouterArgs, instance: &str, dispatch_runtime: &Runtime) -> Result<()> {
    let mut host = Host::new("router", Duration::from_secs(args.drain_timeout))?;
    let http = listen::bind(&args.front.http).await?;
    let (public, dispatch) = (
        bind_if(args.role.is_front(), &args.front.grpc).await?,
        bind_if(args.role.hosts_dispatch(), &args.dispatch).await?,
    );
    let listening = dispatch.as_ref().or(public.as_ref()).map(TcpListener::local_addr).transpose()?;
    let address = member::advertised(&args.cluster, listening.context("a role that listens")?)?;
    let checkpoint = args.model.open().await?;
    let membership = member::connect(&args.cluster).await?;

    let dispatcher = dispatch.is_some().then(|| dispatcher(&checkpoint, &*membership, &host.registry)).flatten();
    if let (Some(listener), Some(dispatcher)) = (dispatch, &dispatcher) {
        let _inside = dispatch_runtime.enter();
        let routes = dispatch_routes(serve_dispatch(dispatcher.clone(), host.inner_close()));
        host.serve_inner_grpc(dispatch_runtime.handle(), listener, routes)?;
    }
    let record = Member {
        hosts_dispatch: dispatcher.is_some(),
        ..member::record(instance, Role::Router, address, &checkpoint, String::new())
    };
    let make: MakeMember = Arc::new(move |_| Ok(record.clone()));
    let registration = membership.register(make).await?;
    match public {
        Some(grpc) => serve_front(args, &mut host, &checkpoint, &*membership, dispatcher, Listeners { http, grpc })?,
        None => host.serve_admin_on(http),
    }
    registration.set_state(MemberState::Ready).await?;
    tracing::info!(instance, role = %args.role, "registered");

    host.stop.cancelled().await;
    let (readiness, limit) = (host.readiness.clone(), Duration::from_secs(args.drain_timeout) + host::SERVER_GRACE);
    host::leave(&readiness, &*registration, host.end_requests(), limit).await;
    host.end().await
}

struct Listeners {
    http: TcpListener,
    grpc: TcpListener,
}

async fn bind_if(wanted: bool, address: &str) -> Result<Option<TcpListener>> {
    Ok(if wanted { Some(listen::bind(address).await?) } else { None })
}

/// `None` for a model without experts.
fn dispatcher(checkpoint: &Checkpoint, membership: &dyn Membership, registry: &Registry) -> Option<Arc<Dispatcher>> {
    let config = DispatchConfig::new(checkpoint.fingerprint());
    let shards = Arc::new(GrpcShards::new(checkpoint.fingerprint(), config.connect_timeout));
    ModelShape::new(checkpoint.config()).map(|shape| Dispatcher::new(config, shape, membership, shards, registry))
}

fn serve_front(
    args: &RouterArgs,
    host: &mut Host,
    checkpoint: &Checkpoint,
    membership: &dyn Membership,
    dispatcher: Option<Arc<Dispatcher>>,
    listeners: Listeners,
) -> Result<()> {
    let connector = Arc::new(GrpcAttention::new(checkpoint.fingerprint())?);
    let (model, keys) = (args.front.model(checkpoint)?, args.front.keys()?);
    let front = args.front.front(model, membership.watch(), connector, &host.registry)?;
    let load: Arc<dyn ClusterLoad> = match dispatcher {
        Some(dispatcher) => Arc::new(DispatcherLoad(dispatcher)),
        None => Arc::new(NoLoad),
    };
    let (readiness, registry) = (host.readiness.clone(), host.registry.clone());
    let service = RouterService { front, load, keys, readiness, registry };
    host.serve_front(service, listeners.http, listeners.grpc)
}
