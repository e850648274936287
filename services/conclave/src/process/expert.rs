//! `conclave expert`: one expert shard.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use conclave_cluster::{
    CellChoice, CellShape, ClusterView, Loads, MakeMember, Member, MemberState, Registration, Role, choose,
};
use conclave_expert::ExpertConfig;
use conclave_kernels::Fp8Weights;
use conclave_model::Checkpoint;
use conclave_serve::{
    State,
    args::{ClusterArgs, LogArgs},
    listen::MemberListener,
    telemetry,
};

use super::{
    DeviceArgs, ModelArgs,
    checkpoint::blocking,
    device::AnyDevice,
    expert_node::{ExpertNode, fp8_weights, numerics},
    host::{self, Host, HostArgs},
    member,
    payload::PayloadArgs,
    range::range,
};

/// Run one expert shard: some cells of routed experts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  conclave expert --model DIR --etcd http://127.0.0.1:2379 --shard 1/4\n  \
                        conclave expert --model DIR --etcd http://127.0.0.1:2379 --cells auto:2")]
pub struct ExpertArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    payload: PayloadArgs,
    #[command(flatten)]
    log: LogArgs,
    /// Cells to hold: groups (0-3,5), auto (what the cluster needs most, as many as fit), or auto:N.
    #[arg(long, env = "CONCLAVE_CELLS", value_name = "CELLS", default_value = "auto", conflicts_with = "shard")]
    cells: CellChoice,
    /// Hold the I-th of N equal parts of all cells.
    #[arg(long, env = "CONCLAVE_SHARD", value_name = "I/N")]
    shard: Option<CellChoice>,
    /// Rows that may wait; more are refused.
    #[arg(long, env = "CONCLAVE_QUEUE_ROWS", value_name = "ROWS", default_value = "16384", value_parser = range::<usize>(1..=16_777_216))]
    queue_rows: usize,
}

/// Runs until told to end.
///
/// # Errors
/// Naming what could not be had: address, checkpoint, coordinator, cells, memory.
pub async fn run(args: ExpertArgs) -> Result<()> {
    let instance = args.cluster.instance("expert")?;
    let guard = telemetry::init(&args.log.telemetry("conclave-expert", &instance))?;
    let ended = live(&args, &instance).await;
    guard.shutdown().await;
    ended
}

async fn live(args: &ExpertArgs, instance: &str) -> Result<()> {
    let mut host = Host::new("expert", host::SERVER_GRACE)?;
    let device = args.device.open()?;
    let pairs = args.payload.grants(member::near(&args.cluster), &device)?;
    let listener = MemberListener::bind(&args.host.grpc, member::near(&args.cluster).then_some(instance)).await?;
    let address = member::advertised(&args.cluster, "--grpc", listener.local_addr()?)?;
    host.serve_admin(&args.host.admin).await?;
    let checkpoint = args.model.open().await?;
    let record = Member {
        same_host: member::same_host(&args.cluster, &listener),
        ..member::record(instance, Role::Expert, address, &checkpoint, numerics(&device))
    };
    let choice = args.shard.clone().unwrap_or_else(|| args.cells.clone());
    let claim = claim(record, choice, &checkpoint, fp8_weights(&device))?;

    let Some(membership) = member::connect(&args.cluster, &host).await? else { return host.end().await };
    let registration = membership.register(claim).await?;
    let config = ExpertConfig { queue_rows: args.queue_rows, pairs, ..ExpertConfig::new(instance) };
    let load = load(config, &device, &checkpoint, &*registration, &host);
    let Some(node) = host::load_or_leave(&host, &*registration, load).await? else { return host.end().await };
    host.serve_members(node.lane.handle(), listener, node.served.clone())?;
    registration.set_state(MemberState::Ready).await?;
    host.readiness.set(State::Ready);
    tracing::info!(instance, cells = registration.member().cells.len(), "ready");

    wait(&host, &node).await;
    let limit = Duration::from_secs(args.host.drain_timeout);
    host::leave(&host.readiness, &*registration, node.drain(), limit).await;
    host.end().await
}

/// The record with the cells that `choice` means among the members of the same checkpoint.
///
/// # Errors
/// When the model has no experts, or not the cells that are asked for.
fn claim(record: Member, choice: CellChoice, checkpoint: &Arc<Checkpoint>, fp8: Fp8Weights) -> Result<MakeMember> {
    let groups = checkpoint.config().cell_groups();
    if groups == 0 {
        anyhow::bail!("{}: every layer is dense, there are no experts to serve", checkpoint.dir().display());
    }
    let shape = CellShape { groups: u32::try_from(groups)?, spans: 1 };
    let fits = checkpoint.cells_that_fit(fp8);
    // What is wrong whoever else is there is said before anybody is waited for.
    choose(&choice, shape, &ClusterView::default(), &Loads::new(), fits)?;
    Ok(Arc::new(move |view| {
        let peers = view.of_checkpoint(&record.fingerprint);
        let cells = choose(&choice, shape, &peers, &Loads::new(), fits)?;
        Ok(Member { cells, ..record.clone() })
    }))
}

async fn load(
    config: ExpertConfig,
    device: &AnyDevice,
    checkpoint: &Arc<Checkpoint>,
    registration: &dyn Registration,
    host: &Host,
) -> Result<ExpertNode> {
    let cells = registration.member().cells;
    let names: Vec<String> = cells.iter().map(ToString::to_string).collect();
    host.readiness.set(State::Starting(format!("loading cells {}", names.join(", "))));
    let (device, checkpoint, registry) = (device.clone(), checkpoint.clone(), host.registry.clone());
    blocking("load cells", move || ExpertNode::start(config, &device, checkpoint, &cells, &registry))
        .await
        .context("load cells")
}

/// Waits until the process is told to end, or the service itself leaves.
async fn wait(host: &Host, node: &ExpertNode) {
    let mut state = node.state.clone();
    tokio::select! {
        () = host.stop.cancelled() => {}
        left = state.wait_for(|state| *state == MemberState::Leaving) => match left {
            Ok(_) => tracing::info!("drained by request"),
            Err(_) => host::fail(&host.readiness, &host.stop, "the compute thread has ended".to_owned()),
        },
    }
}
