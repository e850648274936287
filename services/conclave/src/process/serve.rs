//! `conclave serve`: everything in one process, over the same parts and the same code as a cluster.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use conclave_cluster::{
    CellChoice, CellShape, Loads, LocalMembership, MakeMember, Member, MemberState, Membership, Registration, Role,
    choose,
};
use conclave_dispatch::{DispatchConfig, Dispatcher, ModelShape, MoeLink, ShardLink};
use conclave_expert::ExpertConfig;
use conclave_model::Checkpoint;
use conclave_proto::{CellId, InstanceId};
use conclave_router::front::{ClusterLoad, NoLoad, ServedModel};
use conclave_serve::{State, args::LogArgs, listen, telemetry};

use super::{
    AttentionArgs, DeviceArgs, FrontArgs, ModelArgs,
    attention_node::AttentionNode,
    checkpoint::blocking,
    connectors::{DispatcherLoad, LocalAttention, LocalShards, NoExperts},
    device::AnyDevice,
    expert_node::{ExpertNode, numerics},
    host::Host,
    member, metrics,
};

/// A request that is under way gets this long when the process is told to end.
const GRACE: Duration = Duration::from_secs(1);

/// Serve a model: everything in one process.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  conclave serve\n  conclave serve --model deepseek-ai/DeepSeek-V2-Lite-Chat --http 0.0.0.0:8000"
)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub front: FrontArgs,
    #[command(flatten)]
    pub attention: AttentionArgs,
    #[command(flatten)]
    pub log: LogArgs,
    /// Expert shards to run in this process, each with its part of the cells.
    #[arg(long, env = "CONCLAVE_SHARDS", value_name = "N", default_value = "1")]
    pub shards: u32,
}

/// Runs until told to end.
///
/// # Errors
/// Naming what could not be had: address, checkpoint, memory.
pub async fn run(args: ServeArgs) -> Result<()> {
    let guard = telemetry::init(&args.log.telemetry("conclave", "serve"))?;
    let ended = live(&args).await;
    guard.shutdown().await;
    ended
}

async fn live(args: &ServeArgs) -> Result<()> {
    let mut host = Host::new("serve", GRACE)?;
    let http = listen::bind(&args.front.http).await?;
    let grpc = listen::bind(&args.front.grpc).await?;
    let (http_address, grpc_address) = (http.local_addr()?, grpc.local_addr()?);
    let device = args.device.open()?;
    let checkpoint = args.model.open().await?;
    checkpoint.check_memory(checkpoint.total_bytes())?;

    let parts = tokio::select! {
        parts = Parts::start(args, &host, &device, &checkpoint) => parts?,
        () = host.stop.cancelled() => return host.end().await,
    };
    let front = args.front.front(&checkpoint, parts.membership.watch(), parts.attention.clone(), &host.registry)?;
    let load = parts.load.clone();
    let model = front.model().clone();
    let service = args.front.service(front, load, host.readiness.clone(), host.registry.clone())?;
    host.serve_front(service, http, grpc)?;
    greet(&model, http_address, grpc_address);

    host.stop.cancelled().await;
    host.readiness.set(State::Draining("told to end".to_owned()));
    host.end().await
}

/// Prints what a newcomer does next.
fn greet(model: &ServedModel, http: SocketAddr, grpc: SocketAddr) {
    let (http, grpc) = (member::reachable(http), member::reachable(grpc));
    let body = if model.text.is_some() {
        format!(
            "http://{http}/v1/chat/completions -H 'content-type: application/json' -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"What is the capital of France?\"}}],\"temperature\":0}}'"
        )
    } else {
        format!(
            "http://{http}/v1/completions -H 'content-type: application/json' -d '{{\"prompt\":[1,2,3],\"max_tokens\":16}}'"
        )
    };
    println!("\n{} is ready: http://{http} (OpenAI API), http://{grpc} (gRPC). Try:\n", model.name);
    println!("  curl -s {body}\n");
    if model.text.is_some() {
        println!("  conclave chat --url http://{http}/v1\n");
    }
}

/// The services of this process, registered with each other.
struct Parts {
    membership: LocalMembership,
    attention: Arc<LocalAttention>,
    load: Arc<dyn ClusterLoad>,
    /// Held: a record goes when its registration does.
    _registrations: Vec<Box<dyn Registration>>,
}

impl Parts {
    async fn start(args: &ServeArgs, host: &Host, device: &AnyDevice, checkpoint: &Arc<Checkpoint>) -> Result<Self> {
        let membership = LocalMembership::new("local");
        let mut registrations = Vec::new();
        let mut load: Arc<dyn ClusterLoad> = Arc::new(NoLoad);
        let mut moe: Arc<dyn MoeLink> = Arc::new(NoExperts);
        if let Some(shape) = ModelShape::new(checkpoint.config()) {
            let shards = start_experts(args, host, device, checkpoint).await?;
            for shard in &shards {
                let member =
                    Member { cells: shard.cells.clone(), ..ready(&shard.name, Role::Expert, checkpoint, device) };
                registrations.push(join(&membership, member).await?);
            }
            let links = shards.into_iter().map(|shard| (InstanceId(shard.name), shard.link)).collect();
            let config = DispatchConfig::new(checkpoint.fingerprint());
            let dispatcher = Dispatcher::new(config, shape, &membership, Arc::new(LocalShards(links)), &host.registry);
            load = Arc::new(DispatcherLoad(dispatcher.clone()));
            moe = dispatcher;
        }
        host.readiness.set(State::Starting("loading the trunk".to_owned()));
        let config = args.attention.config("attention", args.front.context, checkpoint)?;
        let (on, from, registry) = (device.clone(), checkpoint.clone(), host.registry.clone());
        let node = blocking("load the trunk", move || AttentionNode::start(config, &on, from, moe, &registry)).await?;
        registrations.push(join(&membership, ready("attention", Role::Attention, checkpoint, device)).await?);
        Ok(Self { membership, attention: Arc::new(LocalAttention(node.link)), load, _registrations: registrations })
    }
}

/// One expert shard of this process.
struct Shard {
    name: String,
    cells: Vec<CellId>,
    link: Arc<dyn ShardLink>,
}

async fn start_experts(
    args: &ServeArgs,
    host: &Host,
    device: &AnyDevice,
    checkpoint: &Arc<Checkpoint>,
) -> Result<Vec<Shard>> {
    let names: Vec<String> = (1..=args.shards).map(|i| format!("expert-{i}")).collect();
    let registries = metrics::shard_registries(&host.registry, &names)?;
    let mut shards = Vec::new();
    for (i, (name, registry)) in (1..).zip(names.into_iter().zip(registries)) {
        host.readiness.set(State::Starting(format!("loading expert shard {i} of {}", args.shards)));
        let cells = part(i, args.shards, checkpoint)?;
        let config = ExpertConfig::new(&name);
        let (on, from, held) = (device.clone(), checkpoint.clone(), cells.clone());
        let node = blocking("load experts", move || ExpertNode::start(config, &on, from, &held, &registry)).await?;
        shards.push(Shard { name, cells, link: node.link });
    }
    Ok(shards)
}

/// The cells of shard `index` of `of`.
fn part(index: u32, of: u32, checkpoint: &Checkpoint) -> Result<Vec<CellId>> {
    let shape = CellShape { groups: u32::try_from(checkpoint.config().cell_groups())?, spans: 1 };
    let view = conclave_cluster::ClusterView::default();
    choose(&CellChoice::Shard { index, of }, shape, &view, &Loads::new(), usize::MAX).context("--shards")
}

fn ready(name: &str, role: Role, checkpoint: &Checkpoint, device: &AnyDevice) -> Member {
    let record = member::record(name, role, "in process".to_owned(), checkpoint, numerics(device));
    Member { state: MemberState::Ready, ..record }
}

async fn join(membership: &LocalMembership, member: Member) -> Result<Box<dyn Registration>> {
    let make: MakeMember = Arc::new(move |_| Ok(member.clone()));
    Ok(membership.register(make).await?)
}
