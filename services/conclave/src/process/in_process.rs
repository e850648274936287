//! The services of one process over in-process links: the same parts and the same code as a cluster.

use std::{ops::RangeInclusive, sync::Arc};

use anyhow::{Context, Result};
use conclave_attention::{sampler::TokenMask, scheduler::MicroBatches};
use conclave_cluster::{
    CellChoice, CellShape, Loads, LocalMembership, MakeMember, Member, MemberState, Membership, Registration, Role,
    choose,
};
use conclave_dispatch::{DispatchConfig, Dispatcher, ModelShape, MoeLink, ShardLink};
use conclave_expert::ExpertConfig;
use conclave_kernels::Device;
use conclave_model::Checkpoint;
use conclave_proto::{CellId, InstanceId};
use conclave_router::front::{ClusterLoad, NoLoad, ServedModel};
use conclave_serve::{Readiness, State};
use prometheus::Registry;

use super::{
    AttentionArgs,
    attention_node::AttentionNode,
    checkpoint::blocking,
    connectors::{DispatcherLoad, LocalAttention, LocalShards, NoExperts},
    device::{AnyDevice, on_device},
    expert_node::ExpertNode,
    member, metrics,
};

/// How many expert shards one process may have: somebody has to hold the experts.
pub const SHARDS: RangeInclusive<u64> = 1..=65_536;

/// What to run.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// The model that is served.
    pub model: &'a ServedModel,
    /// The attention service.
    pub attention: &'a AttentionArgs,
    /// Longest context in tokens; `None`: the model's.
    pub context: Option<u32>,
    /// Expert shards, each with its part of the cells.
    pub shards: u32,
}

/// Where the services show how they do.
#[derive(Clone)]
pub struct Shown {
    /// Says what is being loaded.
    pub readiness: Readiness,
    /// Holds the metrics.
    pub registry: Registry,
}

/// The services of this process, registered with each other.
pub struct InProcess {
    /// Everybody.
    pub membership: LocalMembership,
    /// The attention service.
    pub attention: Arc<LocalAttention>,
    /// What dispatch knows of the shards.
    pub load: Arc<dyn ClusterLoad>,
    /// Dispatch.
    pub moe: Arc<dyn MoeLink>,
    /// Held: a record goes when its registration does.
    _registrations: Vec<Box<dyn Registration>>,
}

impl InProcess {
    /// Loads and starts everything.
    ///
    /// # Errors
    /// When weights cannot be read or do not fit, or a setting makes no sense.
    pub async fn start(
        settings: Settings<'_>,
        shown: &Shown,
        device: &AnyDevice,
        checkpoint: &Arc<Checkpoint>,
    ) -> Result<Self> {
        on_device!(device, device => Self::on(settings, shown, device, checkpoint).await)
    }

    /// The same, on one kind of device.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub async fn on<D: Device>(
        settings: Settings<'_>,
        shown: &Shown,
        device: &Arc<D>,
        checkpoint: &Arc<Checkpoint>,
    ) -> Result<Self> {
        let membership = LocalMembership::new("local");
        let mut registrations = Vec::new();
        let mut load: Arc<dyn ClusterLoad> = Arc::new(NoLoad);
        let mut moe: Arc<dyn MoeLink> = Arc::new(NoExperts);
        let numerics = device.numerics();
        if let Some(shape) = ModelShape::new(checkpoint)? {
            let shards = start_experts(settings.shards, shown, device, checkpoint).await?;
            for shard in &shards {
                let record = ready(&shard.name, Role::Expert, checkpoint, &numerics);
                registrations.push(join(&membership, Member { cells: shard.cells.clone(), ..record }).await?);
            }
            let links = shards.into_iter().map(|shard| (InstanceId(shard.name), shard.link)).collect();
            let config = DispatchConfig::new(checkpoint.fingerprint());
            let dispatcher = Dispatcher::new(config, shape, &membership, Arc::new(LocalShards(links)), &shown.registry);
            load = Arc::new(DispatcherLoad(dispatcher.clone()));
            moe = dispatcher;
        }
        shown.readiness.set(State::Starting("loading the trunk".to_owned()));
        let ServedModel { text, config, .. } = settings.model;
        let with_string = text.as_ref().map(|text| TokenMask::new(config.vocab, |id| text.token_bytes(id).is_some()));
        let mut config = settings.attention.config("attention", settings.context, with_string);
        if config.micro_batches == MicroBatches::Auto {
            // The routed experts compute where the trunk does: there is no wait to be hidden.
            config.micro_batches = MicroBatches::One;
        }
        let (on, from, link, registry) = (device.clone(), checkpoint.clone(), moe.clone(), shown.registry.clone());
        let node = blocking("load the trunk", move || AttentionNode::on(config, on, from, link, &registry)).await?;
        registrations.push(join(&membership, ready("attention", Role::Attention, checkpoint, &numerics)).await?);
        let attention = Arc::new(LocalAttention(node.link));
        Ok(Self { membership, attention, load, moe, _registrations: registrations })
    }
}

/// One expert shard of this process.
struct Shard {
    name: String,
    cells: Vec<CellId>,
    link: Arc<dyn ShardLink>,
}

async fn start_experts<D: Device>(
    count: u32,
    shown: &Shown,
    device: &Arc<D>,
    checkpoint: &Arc<Checkpoint>,
) -> Result<Vec<Shard>> {
    let names: Vec<String> = (1..=count).map(|i| format!("expert-{i}")).collect();
    let registries = metrics::shard_registries(&shown.registry, &names)?;
    let mut shards = Vec::new();
    for (i, (name, registry)) in (1..).zip(names.into_iter().zip(registries)) {
        shown.readiness.set(State::Starting(format!("loading expert shard {i} of {count}")));
        let cells = part(i, count, checkpoint)?;
        let config = ExpertConfig::new(&name);
        let (on, from, held) = (device.clone(), checkpoint.clone(), cells.clone());
        let node = blocking("load experts", move || ExpertNode::on(config, on, from, &held, &registry)).await?;
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

fn ready(name: &str, role: Role, checkpoint: &Checkpoint, numerics: &str) -> Member {
    let record = member::record(name, role, "in process".to_owned(), checkpoint, numerics.to_owned());
    Member { state: MemberState::Ready, ..record }
}

/// Puts a member into the view for as long as what is returned lives.
///
/// # Errors
/// When its name is taken.
pub async fn join(membership: &LocalMembership, member: Member) -> Result<Box<dyn Registration>> {
    let make: MakeMember = Arc::new(move |_| Ok(member.clone()));
    Ok(membership.register(make).await?)
}
