//! The shards that a dispatcher knows: their links, health, speed and load.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use conclave_cluster::{ClusterView, Member, MemberState, Role};
use conclave_proto::InstanceId;
use prometheus::{Histogram, IntCounter};
use tokio::time::Instant;

use crate::health::{Health, Trouble};
use crate::link::{LinkError, ShardConnector, ShardLink};
use crate::metrics::Metrics;
use crate::plan::Candidate;
use crate::predict::Rate;

/// One expert shard.
pub(crate) struct Shard {
    pub(crate) member: Member,
    holds: Vec<bool>,
    state: Mutex<State>,
    link: tokio::sync::Mutex<Option<Arc<dyn ShardLink>>>,
    pub(crate) seconds: Histogram,
    pub(crate) rows: IntCounter,
}

#[derive(Default)]
struct State {
    health: Health,
    rate: Rate,
    /// Pairs that this dispatcher waits for.
    outstanding: usize,
    /// Rows that the shard said were waiting when its last answer left.
    reported: u32,
    probing: bool,
    /// Not in the newest view, and no longer answering: not to be used.
    gone: bool,
    unverified: bool,
}

impl Shard {
    fn new(member: Member, groups: usize, metrics: &Metrics) -> Self {
        let holds = holds(&member, groups);
        let name = member.instance.0.as_str();
        let (seconds, rows) =
            (metrics.shard_seconds.with_label_values(&[name]), metrics.shard_rows.with_label_values(&[name]));
        Self { holds, state: Mutex::default(), link: tokio::sync::Mutex::default(), seconds, rows, member }
    }

    /// The same process with other cells: link, health and speed stay.
    fn renewed(&self, member: Member, groups: usize, metrics: &Metrics) -> Self {
        let mut fresh = Self::new(member, groups, metrics);
        fresh.link = tokio::sync::Mutex::new(self.link.try_lock().ok().and_then(|link| link.clone()));
        {
            let (mut to, from) = (fresh.state(), self.state());
            (to.health, to.rate, to.reported) = (from.health, from.rate, from.reported);
        }
        fresh
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let us_per_pair = state.rate.us_per_pair();
        Candidate {
            holds: self.holds.clone(),
            level: state.health.level(now).max(u8::from(state.unverified)),
            foreign: self.member.numerics != preferred,
            wait_us: waiting as f64 * us_per_pair,
            us_per_pair,
            tried: tried || state.gone,
        }
    }

    pub(crate) fn predict(&self, units: f64) -> Option<Duration> {
        self.state().rate.predict(units)
    }

    pub(crate) fn health_name(&self, now: Instant) -> &'static str {
        if self.state().health.level(now) < 2 { "ok" } else { "set-aside" }
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
        *slot = Some(made.clone());
        Ok(made)
    }

    pub(crate) fn begin(self: &Arc<Self>, pairs: usize) -> Outstanding {
        self.state().outstanding += pairs;
        Outstanding { shard: self.clone(), pairs }
    }

    pub(crate) fn succeed(&self, units: f64, took: Duration, reported: u32) {
        self.seconds.observe(took.as_secs_f64());
        let mut state = self.state();
        state.health.succeed();
        state.rate.learn(units, took);
        state.reported = reported;
    }

    /// Sets the shard aside and, where nothing else can show that it is back, starts to probe it.
    pub(crate) fn fail(self: &Arc<Self>, trouble: Trouble, connector: &Arc<dyn ShardConnector>, timeout: Duration) {
        let probe = {
            let mut state = self.state();
            state.health.fail(trouble, Instant::now());
            state.gone |= state.unverified && trouble != Trouble::Busy;
            let start = trouble.needs_probe() && !state.probing && !state.gone;
            state.probing |= start;
            start
        };
        tracing::warn!(shard = %self.member.instance, trouble = trouble.name(), "shard set aside");
        if probe {
            tokio::spawn(probe_until_well(Arc::downgrade(self), connector.clone(), timeout));
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
    timeout: Duration,
) -> Result<Arc<dyn ShardLink>, LinkError> {
    let instance = || member.instance.0.clone();
    tokio::time::timeout(timeout, connector.connect(member)).await.unwrap_or_else(|_| {
        let message = format!("no connection to {} within {} ms", member.address, timeout.as_millis());
        Err(LinkError::Lost { instance: instance(), message })
    })
}

/// Connects anew after each set-aside time until it works or an answer has shown that the shard is well.
async fn probe_until_well(shard: std::sync::Weak<Shard>, connector: Arc<dyn ShardConnector>, timeout: Duration) {
    loop {
        let at = {
            let Some(shard) = shard.upgrade() else { return };
            let mut state = shard.state();
            let at = state.health.probe_at().filter(|_| !state.gone);
            state.probing = at.is_some();
            at
        };
        let Some(at) = at else { return };
        tokio::time::sleep_until(at).await;
        let Some(shard) = shard.upgrade() else { return };
        match connect(connector.as_ref(), &shard.member, timeout).await {
            Ok(link) => {
                *shard.link.lock().await = Some(link);
                shard.state().health.restore();
                tracing::info!(shard = %shard.member.instance, "shard is back");
            }
            Err(error) => {
                shard.state().health.fail(Trouble::Lost, Instant::now());
                tracing::debug!(%error, "probe failed");
            }
        }
    }
}

fn holds(member: &Member, groups: usize) -> Vec<bool> {
    (0..groups).map(|g| member.cells.iter().any(|c| c.span == 0 && c.group.index() == g)).collect()
}

/// The shards of one view, by instance id.
#[derive(Clone, Default)]
pub(crate) struct Table {
    pub(crate) shards: Vec<Arc<Shard>>,
    /// Numerics id that covers most cells.
    pub(crate) numerics: String,
}

impl Table {
    /// The table of a new view. A shard that vanished from the view without leaving is kept while it answers.
    pub(crate) fn renewed(&self, view: &ClusterView, fingerprint: &str, groups: usize, metrics: &Metrics) -> Self {
        let experts = || view.members.iter().filter(|m| m.role == Role::Expert);
        let mut shards = Vec::new();
        for member in experts().filter(|m| m.state == MemberState::Ready && m.fingerprint == fingerprint) {
            let known = self.shards.iter().find(|s| same_process(&s.member, member));
            shards.push(match known {
                Some(shard) if shard.member.cells == member.cells => {
                    shard.state().unverified = false;
                    shard.clone()
                }
                Some(shard) => Arc::new(shard.renewed(member.clone(), groups, metrics)),
                None => Arc::new(Shard::new(member.clone(), groups, metrics)),
            });
        }
        for shard in &self.shards {
            if experts().any(|m| m.instance == shard.member.instance) {
                continue;
            }
            let alive = shard.link.try_lock().is_ok_and(|link| link.as_ref().is_some_and(|link| link.alive()));
            if alive && shard.health_name(Instant::now()) == "ok" {
                shard.state().unverified = true;
                shards.push(shard.clone());
            } else {
                let _ = metrics.shard_seconds.remove_label_values(&[&shard.member.instance.0]);
                let _ = metrics.shard_rows.remove_label_values(&[&shard.member.instance.0]);
            }
        }
        shards.sort_by(|a, b| a.instance().cmp(b.instance()));
        let numerics = most_covering(&shards, groups);
        Self { shards, numerics }
    }
}

fn same_process(a: &Member, b: &Member) -> bool {
    (&a.instance, &a.address, &a.numerics, a.since_ms) == (&b.instance, &b.address, &b.numerics, b.since_ms)
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
