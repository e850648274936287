//! A cluster of made-up shards: expert `e` multiplies its input by `e + 1`.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::{LocalMembership, Member, MemberState, Membership, Registration, Role};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, GateConfig, LinkError, ModelShape, ShardConnector, ShardLink, WeightRule,
};
use conclave_kernels::cell_tree::{self, Node};
use conclave_kernels::{Dtype, activation};
use conclave_model::{GateMethod, Scoring};
use conclave_proto::v1::{
    Activation, ExpertBatch, ExpertResult, MoeInput, MoeOutput, PartialSum, WorkError, WorkErrorKind, WorkId,
};
use conclave_proto::{CellId, GroupId, InstanceId};
use prometheus::Registry;
use tokio::time::Instant;

pub(crate) const HIDDEN: usize = 16;
pub(crate) const EXPERTS: usize = 32;
pub(crate) const GROUPS: usize = 8;
pub(crate) const SIZE: u32 = 4;
pub(crate) const LAYER: u32 = 1;

pub(crate) fn shape() -> ModelShape {
    ModelShape {
        hidden: HIDDEN,
        groups: GROUPS,
        moe: vec![false, true, true],
        gate: GateConfig {
            experts: EXPERTS,
            top_k: 6,
            groups: GROUPS,
            top_groups: 3,
            method: GateMethod::GroupLimitedGreedy,
            scoring: Scoring::Softmax,
            rule: WeightRule::Scaled,
            scale: 1.0,
        },
        bias: vec![Vec::new(); 3],
    }
}

/// Reproducible values in [-1, 1).
pub(crate) fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

pub(crate) fn input(seed: u64, rows: usize) -> MoeInput {
    let logits: Vec<f32> = values(seed + 1000, rows * EXPERTS).iter().map(|v| v * 4.0).collect();
    MoeInput {
        caller: 7,
        step: seed,
        layer: LAYER,
        activation: Activation::Bf16.into(),
        rows: rows as u32,
        hidden: HIDDEN as u32,
        experts: EXPERTS as u32,
        x: activation::encode(Dtype::Bf16, &values(seed, rows * HIDDEN)).into(),
        logits: activation::encode(Dtype::F32, &logits).into(),
        ..MoeInput::default()
    }
}

/// How a shard behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mood {
    Well,
    Slow(Duration),
    /// Works on something else first, and says so.
    Queued(Duration),
    /// The connection breaks while it computes.
    Breaks,
    /// Cannot be connected to.
    Gone,
    Hangs,
    Refuses(WorkErrorKind),
    /// Leaves the last row of each sum out.
    Short,
}

#[derive(Debug)]
pub(crate) struct FakeShard {
    pub(crate) name: String,
    pub(crate) mood: Mutex<Mood>,
    pub(crate) seen: Mutex<Vec<ExpertBatch>>,
}

impl FakeShard {
    pub(crate) fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    pub(crate) fn calls(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }
}

struct FakeLink(Arc<FakeShard>);

#[async_trait]
impl ShardLink for FakeLink {
    async fn compute(&self, batch: ExpertBatch) -> Result<ExpertResult, LinkError> {
        self.0.seen.lock().unwrap().push(batch.clone());
        let lost = || LinkError::Lost { instance: self.0.name.clone(), message: "broken pipe".into() };
        match self.0.mood() {
            Mood::Well => Ok(answer(&batch)),
            Mood::Slow(wait) | Mood::Queued(wait) => {
                tokio::time::sleep(wait).await;
                Ok(answer(&batch))
            }
            Mood::Breaks | Mood::Gone => Err(lost()),
            Mood::Hangs => std::future::pending().await,
            Mood::Refuses(kind) => {
                let error = WorkError { kind: kind.into(), message: "not today".into() };
                Ok(ExpertResult { id: batch.id, error: Some(error), ..ExpertResult::default() })
            }
            Mood::Short => {
                let mut result = answer(&batch);
                for sum in &mut result.sums {
                    sum.row_index.pop();
                    sum.sum.truncate(sum.row_index.len() * HIDDEN * 2);
                }
                Ok(result)
            }
        }
    }

    fn alive(&self) -> bool {
        !matches!(self.0.mood(), Mood::Breaks | Mood::Gone)
    }

    fn last_sign(&self, _: WorkId) -> Option<Instant> {
        matches!(self.0.mood(), Mood::Queued(_)).then(Instant::now)
    }
}

/// What a right shard answers.
fn answer(batch: &ExpertBatch) -> ExpertResult {
    let mut x = Vec::new();
    activation::decode(Dtype::Bf16, &batch.x, &mut x);
    let mut leaves: BTreeMap<(u32, u32), Vec<f32>> = BTreeMap::new();
    let mut at = 0;
    for (expert, count) in batch.experts.iter().zip(&batch.counts) {
        for _ in 0..*count {
            let (row, weight) = (batch.row_index[at], batch.weights[at]);
            let leaf = leaves.entry((expert / SIZE, row)).or_insert_with(|| vec![0.0; HIDDEN]);
            let x = &x[row as usize * HIDDEN..][..HIDDEN];
            leaf.iter_mut().zip(x).for_each(|(leaf, x)| *leaf += weight * x * (expert + 1) as f32);
            at += 1;
        }
    }
    leaves.values_mut().for_each(|leaf| activation::round(Dtype::Bf16, leaf));
    let held: Vec<usize> = batch.groups.iter().map(|g| *g as usize).collect();
    let mut sums = Vec::new();
    for node in cell_tree::maximal_nodes(GROUPS, &held) {
        let (mut row_index, mut sum) = (Vec::new(), Vec::new());
        for row in 0..batch.rows {
            let leaf = |g: usize| Some((Node { first: g, last: g + 1 }, &leaves.get(&(g as u32, row))?[..]));
            let parts: Vec<(Node, &[f32])> = (node.first..node.last).filter_map(leaf).collect();
            let mut total = vec![0.0; HIDDEN];
            if cell_tree::sum_into(Dtype::Bf16, GROUPS, node, &parts, &mut total) {
                row_index.push(row);
                activation::encode_into(Dtype::Bf16, &total, &mut sum);
            }
        }
        if !row_index.is_empty() {
            sums.push(PartialSum { first: node.first as u32, last: node.last as u32, row_index, sum: sum.into() });
        }
    }
    let activation = Activation::Bf16.into();
    ExpertResult { id: batch.id, activation, hidden: HIDDEN as u32, sums, ..ExpertResult::default() }
}

#[derive(Default)]
struct Fakes(Mutex<BTreeMap<String, Arc<FakeShard>>>);

#[async_trait]
impl ShardConnector for Fakes {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError> {
        let shard = self.0.lock().unwrap()[&member.instance.0].clone();
        if shard.mood() == Mood::Gone {
            return Err(LinkError::Lost { instance: member.instance.0.clone(), message: "connection refused".into() });
        }
        Ok(Arc::new(FakeLink(shard)))
    }
}

/// Shards, and a dispatcher over them.
pub(crate) struct Cluster {
    pub(crate) membership: LocalMembership,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) registry: Registry,
    fakes: Arc<Fakes>,
    registrations: BTreeMap<String, Box<dyn Registration>>,
}

impl Cluster {
    /// One shard per name, with the groups given.
    pub(crate) async fn new(config: DispatchConfig, shards: &[(&str, &[u32])]) -> Self {
        let membership = LocalMembership::new("test");
        let fakes = Arc::new(Fakes::default());
        let registry = Registry::new();
        let dispatcher = Dispatcher::new(config, shape(), &membership, fakes.clone(), &registry);
        let mut cluster = Self { membership, dispatcher, registry, fakes, registrations: BTreeMap::new() };
        for (name, groups) in shards {
            cluster.join(name, groups).await;
        }
        cluster
    }

    pub(crate) async fn join(&mut self, name: &str, groups: &[u32]) -> Arc<FakeShard> {
        let (mood, seen) = (Mutex::new(Mood::Well), Mutex::default());
        let shard = Arc::new(FakeShard { name: name.into(), mood, seen });
        self.fakes.0.lock().unwrap().insert(name.into(), shard.clone());
        let member = member(name, groups);
        let registration = self.membership.register(Arc::new(move |_| Ok(member.clone()))).await.unwrap();
        self.registrations.insert(name.into(), registration);
        shard
    }

    pub(crate) async fn leave(&mut self, name: &str) {
        self.registrations.remove(name).unwrap().leave().await.unwrap();
    }

    pub(crate) fn shard(&self, name: &str) -> Arc<FakeShard> {
        self.fakes.0.lock().unwrap()[name].clone()
    }

    pub(crate) fn health(&self, name: &str) -> &'static str {
        self.dispatcher.health(&InstanceId(name.into()))
    }

    /// A metric's value, its labels summed up; of a histogram, the sample count.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap_or_else(|| panic!("no metric {name}"));
        let value = |m: &prometheus::proto::Metric| match family.get_field_type() {
            prometheus::proto::MetricType::COUNTER => m.get_counter().get_value(),
            prometheus::proto::MetricType::GAUGE => m.get_gauge().get_value(),
            _ => m.get_histogram().get_sample_count() as f64,
        };
        family.get_metric().iter().map(value).sum()
    }
}

pub(crate) fn member(name: &str, groups: &[u32]) -> Member {
    Member {
        instance: InstanceId(name.into()),
        role: Role::Expert,
        state: MemberState::Ready,
        address: format!("http://{name}"),
        same_host: None,
        cells: groups.iter().map(|g| CellId { span: 0, group: GroupId(*g) }).collect(),
        fingerprint: "f".into(),
        numerics: "n".into(),
        hosts_dispatch: false,
        since_ms: 1,
    }
}

pub(crate) const ALL: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

/// The same layer on one shard that holds everything.
pub(crate) async fn expected(input: &MoeInput) -> MoeOutput {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[("only", &ALL)]).await;
    cluster.dispatcher.call(input.clone()).await.unwrap()
}
