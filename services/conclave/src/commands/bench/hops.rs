//! How long a layer's way to the routed experts and back takes, one row at a time.
//!
//! A call is measured as the attention service makes it: from a thread that runs the connections itself while it waits for
//! the sum. It holds everything between the gate logits and the sum: gate, plan,
//! messages, queue, grouped FFN and combine.
//!
//! An *empty* layer is one of a tiny model ([`Rig`]), so that little is left but the way. These ways are measured:
//! - in process: dispatch and shard are called, no message is encoded;
//! - embedded: dispatch beside the caller, the shard behind gRPC: two hops;
//! - through a router: dispatch behind gRPC as well: four hops.
//!
//! The latter two over the Unix sockets of members of one host, and over loopback TCP. Servers are in this process, but on
//! threads of their own. What a call cannot show:
//! another machine's network, and other work on the same threads.
//!
//! A *layer call* is the same for a layer of the model that is measured, its experts' weights included.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use conclave_cluster::{LocalMembership, Member, MemberState, Registration, Role, SameHost};
use conclave_dispatch::{MoeLink, RemoteConfig, RemoteDispatch};
use conclave_kernels::{Device, Dtype, activation};
use conclave_model::{Checkpoint, ModelConfig};
use conclave_proto::{
    InstanceId,
    v1::{Activation, Cluster, ClusterMember, MoeInput},
};
use conclave_serve::{Lane, id, same_host::SameHost::Auto};

use super::{
    limits::Costs,
    prompts::SplitMix,
    report::{AtLeast, Figure, Unit, late},
    rig::{NOBODY_THERE, Rig, dispatcher, grpc_dispatcher},
    stats::percentile,
};
use crate::process::{blocking, in_process::join};

/// Calls before those that count: connections are made, buffers grow.
const WARM_UP: usize = 20;

/// How often a call is measured.
#[derive(Debug, Clone, Copy)]
pub struct Calls {
    /// Samples: each is the median of some calls.
    pub repeat: usize,
    /// Calls of one sample.
    pub calls: usize,
    /// Longest time for all of it.
    pub limit: Duration,
}

/// The ways of an empty layer, and the grouped FFN that is part of each.
///
/// # Errors
/// When the tiny model cannot be made or served.
pub async fn empty_layer<D: Device>(device: &Arc<D>, count: Calls) -> Result<Vec<Figure>> {
    let rig = Rig::start(device).await?;
    let row = Row::of(rig.checkpoint.config(), device.activation()).context("a model with experts")?;
    let (checkpoint, tcp, near) = (&rig.checkpoint, &rig.tcp, &rig.same_host);
    let ways: [(&str, Arc<dyn MoeLink>); 5] = [
        ("hop, in process", dispatcher(checkpoint, tcp, rig.shards.clone())?),
        ("hop, embedded, same host", grpc_dispatcher(checkpoint, near)?),
        ("hop, embedded, TCP", grpc_dispatcher(checkpoint, tcp)?),
        ("hop, through a router, same host", through_router(checkpoint, near)?),
        ("hop, through a router, TCP", through_router(checkpoint, tcp)?),
    ];
    let mut figures = Vec::new();
    for (name, link) in ways {
        figures.push(measure(name, link, row, count).await?);
    }
    let busy = percentile(&rig.busy.samples(), 50.0).into_iter().collect();
    figures.push(Figure::new("hop: grouped FFN in it", Unit::Microseconds, busy));
    Ok(figures)
}

/// A layer of the served model, over a link.
///
/// # Errors
/// When a call fails.
pub async fn layer_call(name: &str, link: Arc<dyn MoeLink>, costs: &Costs, count: Calls) -> Result<Option<Figure>> {
    let Some(row) = Row::of(costs.config(), costs.activation()) else { return Ok(None) };
    let figure = measure(name, link, row, count).await?;
    let at_least = Some(AtLeast { work: costs.layer_call(), tokens: 1.0 });
    Ok(Some(Figure { at_least, ..figure }))
}

/// A layer of the model that a cluster serves, from here to its members.
///
/// # Errors
/// When a member's record makes no sense. A way that cannot be gone is left out with the reason.
pub async fn cluster_layer_calls(
    cluster: &Cluster,
    checkpoint: &Checkpoint,
    costs: &Costs,
    count: Calls,
) -> Result<Vec<Figure>> {
    if Row::of(costs.config(), costs.activation()).is_none() {
        return Ok(Vec::new());
    }
    let (membership, _registrations) = members(cluster).await?;
    let ways: [(&str, Arc<dyn MoeLink>); 2] = [
        ("layer call, embedded", grpc_dispatcher(checkpoint, &membership)?),
        ("layer call, through a router", through_router(checkpoint, &membership)?),
    ];
    let mut figures = Vec::new();
    for (name, link) in ways {
        figures.extend(match layer_call(name, link, costs, count).await {
            Ok(figure) => figure,
            Err(error) => Some(Figure::skipped(name, Unit::Microseconds, format!("{error:#}"))),
        });
    }
    Ok(figures)
}

/// Dispatch at a router's address.
fn through_router(checkpoint: &Checkpoint, cluster: &LocalMembership) -> Result<Arc<dyn MoeLink>> {
    let config = RemoteConfig::new(checkpoint.fingerprint(), id::random_u64()?);
    Ok(RemoteDispatch::new(RemoteConfig { no_router_timeout: NOBODY_THERE, host: Auto.host(), ..config }, cluster))
}

/// The routers and the shards of a cluster as its API shows them.
async fn members(cluster: &Cluster) -> Result<(LocalMembership, Vec<Box<dyn Registration>>)> {
    let membership = LocalMembership::new(&cluster.name);
    let mut registrations = Vec::new();
    for member in cluster.members.iter().filter(|member| member.state == "ready") {
        if let Some(role) = [Role::Router, Role::Expert].into_iter().find(|role| role.name() == member.role) {
            registrations.push(join(&membership, record(member, role)).await?);
        }
    }
    Ok((membership, registrations))
}

fn record(member: &ClusterMember, role: Role) -> Member {
    Member {
        instance: InstanceId(member.instance.clone()),
        role,
        state: MemberState::Ready,
        address: member.address.clone(),
        same_host: (!member.socket.is_empty())
            .then(|| SameHost { host: member.host.clone(), socket: member.socket.clone() }),
        cells: member.cells.iter().copied().map(Into::into).collect(),
        fingerprint: member.fingerprint.clone(),
        numerics: member.numerics.clone(),
        // The API does not tell; one that does not is found out by asking.
        hosts_dispatch: role == Role::Router,
        since_ms: 0,
    }
}

/// One row of a layer with routed experts.
#[derive(Debug, Clone, Copy)]
struct Row {
    layer: u32,
    hidden: usize,
    experts: usize,
    activation: Dtype,
}

impl Row {
    /// Of the last such layer; `None` where every layer is dense.
    fn of(config: &ModelConfig, activation: Dtype) -> Option<Self> {
        let layer = u32::try_from(config.moe_layers().last()?).ok()?;
        Some(Self { layer, hidden: config.hidden, experts: config.routed_experts?, activation })
    }

    /// Random, so that all experts have their turn.
    fn input(&self, caller: u64, step: u64, random: &mut SplitMix) -> MoeInput {
        let mut values = |count: usize| -> Vec<f32> { (0..count).map(|_| random.unit()).collect() };
        MoeInput {
            caller,
            step,
            layer: self.layer,
            activation: Activation::from(self.activation).into(),
            rows: 1,
            hidden: self.hidden as u32,
            experts: self.experts as u32,
            x: activation::encode(self.activation, &values(self.hidden)).into(),
            logits: activation::encode(Dtype::F32, &values(self.experts)).into(),
            ..MoeInput::default()
        }
    }
}

/// Median times of calls of one row.
async fn measure(name: &str, link: Arc<dyn MoeLink>, row: Row, count: Calls) -> Result<Figure> {
    let lane = Lane::start("bench-lane")?;
    let samples = blocking("layer calls", move || {
        let (caller, mut random, mut step) = (id::random_u64()?, SplitMix(1), 0);
        let deadline = Instant::now() + count.limit;
        let mut median = |calls: usize| -> Result<Option<f64>> {
            let mut times = Vec::with_capacity(calls);
            while times.len() < calls && Instant::now() < deadline {
                step += 1;
                times.push(call(&lane, &link, row.input(caller, step, &mut random))?);
            }
            Ok(percentile(&times, 50.0).map(|seconds| seconds * 1e6))
        };
        median(WARM_UP)?;
        let samples: Result<Vec<Option<f64>>> = (0..count.repeat).map(|_| median(count.calls)).collect();
        Ok(samples?.into_iter().flatten().collect::<Vec<f64>>())
    });
    let samples = samples.await?;
    Ok(match samples.is_empty() {
        true => Figure::skipped(name, Unit::Microseconds, late(count.limit)),
        false => Figure::new(name, Unit::Microseconds, samples),
    })
}

/// Seconds of one call, made as the attention service makes it.
fn call(lane: &Lane, link: &Arc<dyn MoeLink>, input: MoeInput) -> Result<f64> {
    let link = link.clone();
    let started = Instant::now();
    let call = lane.spawn_and_turn(async move { link.moe(input).await });
    lane.stirrer().stir();
    let output = lane.block_on(call)??;
    let elapsed = started.elapsed().as_secs_f64();
    match output.error {
        Some(error) => bail!(error.message),
        None => Ok(elapsed),
    }
}

#[cfg(test)]
mod tests {
    use conclave_kernels::{Pool, Reference};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_empty_layer_goes_each_way() {
        let device = Arc::new(Reference::new(Pool::new(1).unwrap()));
        let count = Calls { repeat: 2, calls: 3, limit: Duration::from_secs(60) };
        let figures = empty_layer(&device, count).await.unwrap();
        assert_eq!(figures.len(), 6);
        for figure in &figures {
            assert!(!figure.samples.is_empty(), "{figure:?}");
            assert!(figure.samples.iter().all(|time| *time > 0.1 && *time < 1e7), "{figure:?}");
        }
    }
}
