//! The shards that a dispatcher knows: their links, condition, speed and load.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use conclave_cluster::{CellMap, ClusterView, Member};
use conclave_proto::InstanceId;
use prometheus::{Histogram, IntCounter};
use tokio::time::{Instant, sleep, timeout};

use crate::condition::{Condition, Trouble};
use crate::link::{LinkError, ShardConnector, ShardLink};
use crate::metrics::{MESSAGES, Metrics};
use crate::plan::Candidate;
use crate::predict::Rate;

/// How often a shard that is set aside is looked at.
const PROBE_TICK: Duration = Duration::from_millis(100);

/// One expert shard.
pub(crate) struct Shard {
    pub(crate) member: Member,
    holds: Vec<bool>,
    state: Mutex<State>,
    link: tokio::sync::Mutex<Option<Arc<dyn ShardLink>>>,
    pub(crate) seconds: Histogram,
    pub(crate) rows: IntCounter,
    metrics: Metrics,
}

#[derive(Default)]
struct State {
    condition: Condition,
    rate: Rate,
    /// Pairs that this dispatcher waits for.
    outstanding: usize,
    /// Rows that the shard said were waiting when its last answer left.
    reported: u32,
    probing: bool,
    /// Its record is gone from the coordinator: used as long as it answers.
    unverified: bool,
    /// Unverified, and it failed.
    gone: bool,
}

impl Shard {
    fn new(member: Member, groups: usize, metrics: &Metrics) -> Self {
        let name = member.instance.0.as_str();
        Self {
            holds: (0..groups).map(|g| member.cells.iter().any(|c| c.span == 0 && c.group.index() == g)).collect(),
            seconds: metrics.shard_seconds.with_label_values(&[name]),
            rows: metrics.shard_rows.with_label_values(&[name]),
            state: Mutex::default(),
            link: tokio::sync::Mutex::default(),
            metrics: metrics.clone(),
            member,
        }
    }

    /// The same process with other cells: link, condition and speed stay.
    fn renewed(&self, member: Member, groups: usize, metrics: &Metrics) -> Self {
        let mut fresh = Self::new(member, groups, metrics);
        fresh.link = tokio::sync::Mutex::new(self.link.try_lock().ok().and_then(|link| link.clone()));
        {
            let (mut to, from) = (fresh.state(), self.state());
            (to.condition, to.rate, to.reported) = (from.condition, from.rate, from.reported);
        }
        fresh
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_verified(&self, verified: bool) {
        let mut state = self.state();
        state.unverified = !verified;
        state.gone &= !verified;
    }

    pub(crate) fn instance(&self) -> &InstanceId {
        &self.member.instance
    }

    pub(crate) fn holds(&self, group: u32) -> bool {
        self.holds.get(group as usize).copied().unwrap_or(false)
    }

    pub(crate) fn candidate(&self, preferred: &str, tried: bool, now: Instant) -> Candidate {
        let state = self.state();
        let waiting = state.outstanding.max(state.reported as usize);
        Candidate {
            holds: self.holds.clone(),
            level: state.condition.level(now.into_std()).max(u8::from(state.unverified)),
            foreign: self.member.numerics != preferred,
            waiting,
            us_per_pair: state.rate.us_per_pair(),
            tried: tried || state.gone,
        }
    }

    pub(crate) fn predict(&self, units: f64) -> Option<Duration> {
        self.state().rate.predict(units)
    }

    /// Rows that the shard said were waiting when its last answer left.
    pub(crate) fn reported(&self) -> u32 {
        self.state().reported
    }

    pub(crate) fn is_aside(&self) -> bool {
        self.state().condition.is_aside()
    }

    /// The link, made now where there is none.
    pub(crate) async fn link(
        &self,
        connector: &dyn ShardConnector,
        timeout: Duration,
    ) -> Result<Arc<dyn ShardLink>, LinkError> {
        let mut slot = self.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.alive()) {
            return Ok(link.clone());
        }
        *slot = None;
        let made = connect(connector, &self.member, timeout).await?;
        self.linked(&*made);
        *slot = Some(made.clone());
        Ok(made)
    }

    fn linked(&self, link: &dyn ShardLink) {
        let (shard, transport, pair) = (&self.member.instance, link.transport(), link.pair());
        match &pair {
            Ok(pair) => tracing::info!(%shard, transport = transport.name(), payload = pair.way().name(), "connected"),
            Err(why) => tracing::info!(%shard, transport = transport.name(), payload = MESSAGES, %why, "connected"),
        }
        self.metrics.link(&shard.0, transport, pair.as_ref().map(|pair| pair.way()));
    }

    /// Work of some pairs goes out.
    pub(crate) fn begin(self: &Arc<Self>, pairs: usize) -> Outstanding {
        let mut state = self.state();
        state.condition.begin();
        state.outstanding += pairs;
        Outstanding { shard: self.clone(), pairs }
    }

    pub(crate) fn succeed(&self, units: f64, took: Duration, reported: u32) {
        self.seconds.observe(took.as_secs_f64());
        let mut state = self.state();
        if state.condition.is_aside() {
            tracing::info!(shard = %self.member.instance, "shard is back");
        }
        state.condition.succeed();
        state.rate.learn(units, took);
        state.reported = reported;
    }

    /// Notes a failure; a shard that is set aside is probed from now on.
    pub(crate) fn fail(self: &Arc<Self>, trouble: Trouble, connector: &Arc<dyn ShardConnector>, timeout: Duration) {
        let (set_aside, probe) = {
            let mut state = self.state();
            let before = state.condition.is_aside();
            let aside = state.condition.fail(trouble, Instant::now().into_std());
            state.gone |= state.unverified && trouble != Trouble::Busy;
            let probe = aside && !state.probing && !state.gone;
            state.probing |= probe;
            (aside && !before, probe)
        };
        if set_aside {
            tracing::warn!(shard = %self.member.instance, trouble = trouble.name(), "shard is set aside");
        }
        if probe {
            tokio::spawn(probe_until_back(Arc::downgrade(self), connector.clone(), timeout));
        }
    }
}

/// Work that is out at a shard; counted until dropped.
pub(crate) struct Outstanding {
    shard: Arc<Shard>,
    pairs: usize,
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.shard.state().outstanding -= self.pairs;
    }
}

async fn connect(
    connector: &dyn ShardConnector,
    member: &Member,
    limit: Duration,
) -> Result<Arc<dyn ShardLink>, LinkError> {
    timeout(limit, connector.connect(member)).await.unwrap_or_else(|_| {
        let message = format!("no connection to {} within {} ms", member.address, limit.as_millis());
        Err(LinkError::Lost { instance: member.instance.0.clone(), message })
    })
}

/// Connects anew whenever a probe is due, until an answer has shown that the shard is back or it is no longer known.
async fn probe_until_back(shard: Weak<Shard>, connector: Arc<dyn ShardConnector>, limit: Duration) {
    loop {
        sleep(PROBE_TICK).await;
        let Some(shard) = shard.upgrade() else { return };
        let due = {
            let mut state = shard.state();
            state.probing = state.condition.is_aside() && !state.gone;
            if !state.probing {
                return;
            }
            state.condition.probe(Instant::now().into_std())
        };
        if !due {
            continue;
        }
        match connect(connector.as_ref(), &shard.member, limit).await {
            Ok(link) => {
                shard.linked(&*link);
                *shard.link.lock().await = Some(link);
                shard.state().condition.connected();
            }
            Err(error) => {
                tracing::debug!(%error, "probe failed");
                shard.state().condition.unreachable(Instant::now().into_std());
            }
        }
    }
}

/// The shards of one view.
#[derive(Clone, Default)]
pub(crate) struct Table {
    /// By instance id.
    pub(crate) shards: Vec<Arc<Shard>>,
    /// Numerics id that covers most groups.
    pub(crate) numerics: String,
    refused: Vec<Member>,
}

impl Table {
    /// The table of a new view.
    pub(crate) fn renewed(&self, view: &ClusterView, fingerprint: &str, groups: usize, metrics: &Metrics) -> Self {
        let map = CellMap::from(view, fingerprint);
        let mut shards: Vec<Arc<Shard>> = Vec::with_capacity(map.shards().len());
        for replica in map.shards() {
            let member = &replica.member;
            let known = self.shards.iter().find(|shard| same_process(&shard.member, member));
            let shard = match known {
                Some(shard) if shard.member.cells == member.cells => shard.clone(),
                Some(shard) => Arc::new(shard.renewed(member.clone(), groups, metrics)),
                None => Arc::new(Shard::new(member.clone(), groups, metrics)),
            };
            shard.set_verified(replica.verified);
            shards.push(shard);
        }
        shards.sort_by(|a, b| a.instance().cmp(b.instance()));
        for gone in self.shards.iter().filter(|old| !shards.iter().any(|s| s.instance() == old.instance())) {
            // Fails only where there is no such series.
            let _ = metrics.shard_seconds.remove_label_values(&[&gone.instance().0]);
            let _ = metrics.shard_rows.remove_label_values(&[&gone.instance().0]);
            metrics.unlink(&gone.instance().0);
        }
        for member in map.refused().iter().filter(|member| !self.refused.contains(member)) {
            let (shard, found) = (&member.instance, &member.fingerprint);
            tracing::error!(%shard, found, expected = fingerprint, "expert with another checkpoint is refused");
        }
        Self { numerics: most_covering(&shards, groups), shards, refused: map.refused().to_vec() }
    }
}

fn same_process(a: &Member, b: &Member) -> bool {
    let process =
        |m: &Member| (m.instance.clone(), m.address.clone(), m.same_host.clone(), m.numerics.clone(), m.since_ms);
    process(a) == process(b)
}

/// The numerics id whose shards hold the most groups between them; the first by name among equals.
fn most_covering(shards: &[Arc<Shard>], groups: usize) -> String {
    let covered = |id: &str| {
        let held = |g: &u32| shards.iter().any(|s| s.member.numerics == id && s.holds(*g));
        (0..groups as u32).filter(held).count()
    };
    let mut ids: Vec<&str> = shards.iter().map(|s| s.member.numerics.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter().rev().max_by_key(|id| covered(id)).unwrap_or_default().to_owned()
}
