//! `conclave attention`: one attention replica.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use conclave_attention::sampler::TokenMask;
use conclave_cluster::{MakeMember, MemberState, Membership, Role};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, ModelShape, MoeLink, RemoteConfig, RemoteDispatch, RemoteShards, pair::Pairs,
};
use conclave_model::Checkpoint;
use conclave_serve::{
    State,
    args::{ClusterArgs, LogArgs},
    id, listen, telemetry,
};
use prometheus::Registry;

use super::{
    AttentionArgs, DeviceArgs, ModelArgs,
    attention_node::AttentionNode,
    checkpoint::blocking,
    device::AnyDevice,
    expert_node::numerics,
    host::{self, Host, HostArgs},
    member,
    payload::PayloadArgs,
    range::range,
};

/// Where layers are dispatched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DispatchMode {
    /// By a router that hosts dispatch: four hops a layer.
    Router,
    /// In this process: two hops a layer.
    Embedded,
}

/// Run one attention replica: the trunk and the latent cache.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  conclave attention --model DIR --etcd http://127.0.0.1:2379 --dispatch embedded")]
pub struct AttentionCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    attention: AttentionArgs,
    #[command(flatten)]
    payload: PayloadArgs,
    #[command(flatten)]
    log: LogArgs,
    /// Where MoE layers are dispatched to expert shards.
    #[arg(long, env = "CONCLAVE_DISPATCH", value_enum, default_value = "router")]
    dispatch: DispatchMode,
    /// Longest context in tokens [default: the model's, or what the cache holds].
    #[arg(long, env = "CONCLAVE_CONTEXT", value_name = "TOKENS", value_parser = range::<u32>(1..=u32::MAX.into()))]
    context: Option<u32>,
}

/// Runs until told to end.
///
/// # Errors
/// Naming what could not be had: address, checkpoint, coordinator, memory.
pub async fn run(args: AttentionCommand) -> Result<()> {
    let instance = args.cluster.instance("attention")?;
    let guard = telemetry::init(&args.log.telemetry("conclave-attention", &instance))?;
    let ended = live(&args, &instance).await;
    guard.shutdown().await;
    ended
}

async fn live(args: &AttentionCommand, instance: &str) -> Result<()> {
    let mut host = Host::new("attention", host::SERVER_GRACE)?;
    let device = args.device.open()?;
    let listener = listen::bind(&args.host.grpc).await?;
    let address = member::advertised(&args.cluster, "--grpc", listener.local_addr()?)?;
    host.serve_admin(&args.host.admin).await?;
    let checkpoint = args.model.open().await?;
    args.attention.check(args.context, &device, &checkpoint)?;
    let pairs = pairs(args, &device, &checkpoint)?;

    let Some(membership) = member::connect(&args.cluster, &host).await? else { return host.end().await };
    let record = member::record(instance, Role::Attention, address, &checkpoint, numerics(&device));
    let make: MakeMember = Arc::new(move |_| Ok(record.clone()));
    let registration = membership.register(make).await?;
    let moe = moe_link(args, pairs, &checkpoint, &*membership, &host.registry)?;
    let load = load(args, instance, &device, &checkpoint, moe, &host);
    let Some(node) = host::load_or_leave(&host, &*registration, load).await? else { return host.end().await };
    host.serve_grpc(listener, node.routes.clone());
    registration.set_state(MemberState::Ready).await?;
    host.readiness.set(State::Ready);
    tracing::info!(instance, "ready");

    host.stop.cancelled().await;
    let limit = Duration::from_secs(args.host.drain_timeout);
    host::leave(&host.readiness, &*registration, node.drain(), limit).await;
    host.end().await
}

/// How rows and sums go to shards, where layers are dispatched here.
fn pairs(args: &AttentionCommand, device: &AnyDevice, checkpoint: &Checkpoint) -> Result<Pairs> {
    let rows = (args.attention.rows(), checkpoint.config().hidden);
    match args.dispatch {
        DispatchMode::Embedded => args.payload.pairs(member::near(&args.cluster), device, rows),
        DispatchMode::Router => args.payload.by_router(),
    }
}

fn moe_link(
    args: &AttentionCommand,
    pairs: Pairs,
    checkpoint: &Checkpoint,
    membership: &dyn Membership,
    registry: &Registry,
) -> Result<Arc<dyn MoeLink>> {
    let (fingerprint, here) = (checkpoint.fingerprint(), args.cluster.same_host.host());
    let embedded = match args.dispatch {
        DispatchMode::Embedded => ModelShape::new(checkpoint)?,
        DispatchMode::Router => None,
    };
    Ok(match embedded {
        Some(shape) => {
            let config = DispatchConfig::new(fingerprint);
            let shards = RemoteShards::new(fingerprint, config.connect_timeout, here).with_pairs(pairs);
            Dispatcher::new(config, shape, membership, Arc::new(shards), registry)
        }
        None => {
            let config = RemoteConfig { host: here, ..RemoteConfig::new(fingerprint, id::random_u64()?) };
            RemoteDispatch::new(config, membership)
        }
    })
}

async fn load(
    args: &AttentionCommand,
    instance: &str,
    device: &AnyDevice,
    checkpoint: &Arc<Checkpoint>,
    moe: Arc<dyn MoeLink>,
    host: &Host,
) -> Result<AttentionNode> {
    host.readiness.set(State::Starting("loading the trunk".to_owned()));
    let vocab = checkpoint.config().vocab;
    let with_string = checkpoint.text()?.map(|text| TokenMask::new(vocab, |id| text.has_string(id)));
    let config = args.attention.config(instance, args.context, with_string);
    let (device, checkpoint, registry) = (device.clone(), checkpoint.clone(), host.registry.clone());
    blocking("load the trunk", move || AttentionNode::start(config, &device, checkpoint, moe, &registry))
        .await
        .context("load the trunk")
}
