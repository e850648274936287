//! The cluster as a front shows it: the membership view, with the load that the dispatcher and the replicas report.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use conclave_cluster::{ClusterView, Member, MemberState, Role};
use conclave_proto::{CellId, InstanceId, v1};
use futures::future;

use super::{
    ServedModel,
    replicas::{self, Replicas},
};

/// What the dispatcher of this process knows of expert shards.
pub trait ClusterLoad: Send + Sync + 'static {
    /// How it sees a shard (ok, set-aside); `None` where it has not talked to it.
    fn health(&self, instance: &InstanceId) -> Option<String>;
    /// Rows that waited at a shard when it last answered.
    fn queued_rows(&self, instance: &InstanceId) -> Option<u32>;
    /// (row, expert) pairs sent to a cell since start.
    fn cell_rows(&self, cell: CellId) -> u64;
}

/// For a router without dispatch: nothing is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLoad;

impl ClusterLoad for NoLoad {
    fn health(&self, _: &InstanceId) -> Option<String> {
        None
    }

    fn queued_rows(&self, _: &InstanceId) -> Option<u32> {
        None
    }

    fn cell_rows(&self, _: CellId) -> u64 {
        0
    }
}

/// What is missing for requests to be served: an attention replica, or expert groups; `None` when nothing is.
pub(super) fn missing(view: &ClusterView, model: &ServedModel) -> Option<String> {
    if replicas::ready(view, &model.fingerprint).next().is_none() {
        return Some("no attention replica of this checkpoint is ready".to_owned());
    }
    let held = |group: usize| ready_experts(view, &model.fingerprint).any(|member| holds(member, group));
    let absent: Vec<String> =
        (0..model.config.cell_groups()).filter(|&group| !held(group)).map(|group| group.to_string()).collect();
    (!absent.is_empty()).then(|| format!("no ready expert shard holds group {}", absent.join(", ")))
}

fn ready_experts<'a>(view: &'a ClusterView, fingerprint: &'a str) -> impl Iterator<Item = &'a Member> {
    view.members.iter().filter(move |member| {
        member.role == Role::Expert && member.state == MemberState::Ready && member.fingerprint == fingerprint
    })
}

fn holds(member: &Member, group: usize) -> bool {
    member.cells.iter().any(|cell| cell.group.index() == group)
}

/// The public view. Attention replicas are asked for their load, all at once.
pub(super) async fn report(replicas: &Replicas, fingerprint: &str, load: &dyn ClusterLoad) -> v1::Cluster {
    let view = replicas.view();
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis());
    let now_ms = u64::try_from(now_ms).unwrap_or(u64::MAX);
    let verified = |member: &Member| view.is_verified(&member.instance);
    let members = future::join_all(view.members.iter().map(|member| async move {
        let (queue, health) = match member.role {
            Role::Attention => attention_load(replicas, member).await,
            Role::Expert => (load.queued_rows(&member.instance), load.health(&member.instance)),
            Role::Router => (None, None),
        };
        let health = seen(health, verified(member));
        describe(member, now_ms, queue, health)
    }));
    v1::Cluster {
        name: view.cluster.clone(),
        coordinator_reachable: view.reachable,
        members: members.await,
        cells: cells(&view, fingerprint, load),
    }
}

/// One word for a member: what is known of it, unless its record is gone and nothing worse is known.
fn seen(health: Option<String>, verified: bool) -> String {
    match health {
        Some(health) if verified || health == "set-aside" => health,
        _ if !verified => "unverified".to_owned(),
        _ => "unknown".to_owned(),
    }
}

/// Running and waiting sequences of a replica, and whether it answered.
async fn attention_load(replicas: &Replicas, member: &Member) -> (Option<u32>, Option<String>) {
    match replicas.status(member).await {
        Some(status) => (Some(status.running.saturating_add(status.waiting)), Some("ok".to_owned())),
        None => (None, None),
    }
}

fn describe(member: &Member, now_ms: u64, load: Option<u32>, health: String) -> v1::ClusterMember {
    let role = match member.role {
        Role::Router => "router",
        Role::Attention => "attention",
        Role::Expert => "expert",
    };
    let state = match member.state {
        MemberState::Loading => "loading",
        MemberState::Ready => "ready",
        MemberState::Leaving => "leaving",
    };
    let same_host = member.same_host.as_ref();
    v1::ClusterMember {
        instance: member.instance.0.clone(),
        role: role.to_owned(),
        address: member.address.clone(),
        state: state.to_owned(),
        fingerprint: member.fingerprint.clone(),
        numerics: member.numerics.clone(),
        cells: member.cells.iter().map(|&cell| cell.into()).collect(),
        age_ms: now_ms.saturating_sub(member.since_ms),
        load: load.unwrap_or(0),
        health,
        host: same_host.map_or_else(String::new, |same| same.host.clone()),
        socket: same_host.map_or_else(String::new, |same| same.socket.clone()),
    }
}

/// Every cell that a member of this checkpoint claims, with its replicas.
fn cells(view: &ClusterView, fingerprint: &str, load: &dyn ClusterLoad) -> Vec<v1::CellReplicas> {
    let mut cells: BTreeMap<CellId, Vec<String>> = BTreeMap::new();
    for member in view.members.iter().filter(|member| member.fingerprint == fingerprint) {
        for &cell in &member.cells {
            cells.entry(cell).or_default().push(member.instance.0.clone());
        }
    }
    let replicas = |(cell, instances): (CellId, Vec<String>)| v1::CellReplicas {
        cell: Some(cell.into()),
        instances,
        rows: load.cell_rows(cell),
    };
    cells.into_iter().map(replicas).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_without_a_record_is_unverified_unless_it_is_known_to_fail() {
        let of = |health: Option<&str>, verified| seen(health.map(str::to_owned), verified);
        assert_eq!([of(Some("ok"), true), of(None, true)], ["ok", "unknown"]);
        assert_eq!([of(Some("ok"), false), of(None, false)], ["unverified", "unverified"]);
        assert_eq!([of(Some("set-aside"), true), of(Some("set-aside"), false)], ["set-aside", "set-aside"]);
    }
}
