//! A trunk, a dispatcher and expert services in this process, without the engine in between: all-position logits.

use std::{collections::HashMap, path::Path, sync::Arc};

use async_trait::async_trait;
use conclave_attention::{
    forward::{self, Cut, MoeCaller},
    trunk::{DeviceTrunk, TrunkSize},
};
use conclave_cluster::{
    CellChoice, CellShape, ClusterView, Loads, LocalMembership, MakeMember, Member, MemberState, Membership,
    Registration, Role, choose,
};
use conclave_dispatch::{DispatchConfig, Dispatcher, LinkError, ModelShape, MoeLink, ShardConnector, ShardLink};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::Device;
use conclave_model::{Checkpoint, Progress};
use conclave_proto::InstanceId;
use prometheus::Registry;

use crate::files::Case;

/// Everything it takes to run a sequence.
pub(crate) struct System<D: Device> {
    trunk: Option<DeviceTrunk<D>>,
    dispatch: Arc<dyn MoeLink>,
    shards: Vec<Arc<dyn ShardLink>>,
    checkpoint: Arc<Checkpoint>,
    _registrations: Vec<Box<dyn Registration>>,
}

struct LocalShards(HashMap<InstanceId, Arc<dyn ShardLink>>);

#[async_trait]
impl ShardConnector for LocalShards {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError> {
        Ok(self.0[&member.instance].clone())
    }
}

impl<D: Device> System<D> {
    /// Loads a checkpoint with its experts over `of` shards.
    pub(crate) async fn start(dir: &Path, device: fn() -> Arc<D>, of: u32) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(dir.to_str().unwrap()).unwrap());
        let config = checkpoint.config();
        let membership = LocalMembership::new("test");
        let shape = CellShape { groups: u32::try_from(config.cell_groups()).unwrap(), spans: 1 };
        let (mut links, mut registrations) = (HashMap::new(), Vec::new());
        for index in 1..=of {
            let choice = CellChoice::Shard { index, of };
            let cells = choose(&choice, shape, &ClusterView::default(), &Loads::new(), usize::MAX).unwrap();
            let name = format!("expert-{index}");
            let (expert, registry) = (ExpertConfig::new(&name), Registry::new());
            let service = ExpertService::start(expert, device(), checkpoint.clone(), &cells, &registry).unwrap();
            let member = Member {
                instance: InstanceId(name.clone()),
                role: Role::Expert,
                state: MemberState::Ready,
                address: "in process".into(),
                same_host: None,
                cells,
                fingerprint: checkpoint.fingerprint().into(),
                numerics: device().numerics(),
                hosts_dispatch: false,
                since_ms: 0,
            };
            let make: MakeMember = Arc::new(move |_| Ok(member.clone()));
            registrations.push(membership.register(make).await.unwrap());
            links.insert(InstanceId(name), service as Arc<dyn ShardLink>);
        }
        let shards = links.values().cloned().collect();
        let dispatch = Dispatcher::new(
            DispatchConfig::new(checkpoint.fingerprint()),
            ModelShape::new(&checkpoint).unwrap().unwrap(),
            &membership,
            Arc::new(LocalShards(links)),
            &Registry::new(),
        );
        let limit = config.max_position.min(2048);
        let blocks = u32::try_from(limit.div_ceil(D::BLOCK)).unwrap();
        let size = TrunkSize { blocks, context_limit: limit, exact: true };
        let trunk = DeviceTrunk::load(device(), &checkpoint, size, &Progress::default()).unwrap();
        Self { trunk: Some(trunk), dispatch, shards, checkpoint, _registrations: registrations }
    }

    /// Sends layers elsewhere from now on.
    pub(crate) fn dispatch_by(&mut self, link: Arc<dyn MoeLink>) {
        self.dispatch = link;
    }

    /// Fingerprint of the checkpoint.
    pub(crate) fn fingerprint(&self) -> &str {
        self.checkpoint.fingerprint()
    }

    /// Where its experts are called.
    #[cfg(feature = "cuda-shim")]
    pub(crate) fn link(&self) -> Arc<dyn MoeLink> {
        self.dispatch.clone()
    }

    /// Width of the logits.
    pub(crate) fn vocab(&self) -> usize {
        self.checkpoint.config().vocab
    }

    /// The checkpoint.
    pub(crate) fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// A shard; the only one if the system was started with one.
    pub(crate) fn shard(&self) -> Arc<dyn ShardLink> {
        self.shards[0].clone()
    }

    /// Logits `[T, vocab]` of all positions, in chunks.
    pub(crate) async fn logits(&mut self, ids: &[u32], cut: impl Into<Cut>) -> Vec<f32> {
        self.run(self.dispatch.clone(), ids, cut.into()).await
    }

    /// The same in one chunk, with another link to the experts.
    pub(crate) async fn logits_by(&mut self, link: Arc<dyn MoeLink>, ids: &[u32]) -> Vec<f32> {
        self.run(link, ids, ids.len().into()).await
    }

    /// Logits of the longest sequence of a case.
    pub(crate) async fn last_logits(&mut self, case: &Case) -> Vec<f32> {
        let ids = &case.sequences.last().unwrap().ids;
        self.logits(ids, ids.len()).await
    }

    async fn run(&mut self, link: Arc<dyn MoeLink>, ids: &[u32], cut: Cut) -> Vec<f32> {
        let (mut trunk, ids) = (self.trunk.take().unwrap(), ids.to_vec());
        let work = move || {
            let mut caller = MoeCaller::new(link, 1).unwrap();
            let logits = forward::logits(&mut trunk, &mut caller, &ids, cut).unwrap();
            (trunk, logits)
        };
        let (trunk, logits) = tokio::task::spawn_blocking(work).await.unwrap();
        self.trunk = Some(trunk);
        logits
    }
}
