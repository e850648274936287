//! A member of the cluster, as it stands in the coordinator, and the view of all of them.

use std::fmt;

use conclave_proto::{CellId, InstanceId};
use serde::{Deserialize, Serialize};

/// What a member does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves the API, hosts dispatch, or both.
    Router,
    /// Runs the trunk.
    Attention,
    /// Holds cells.
    Expert,
}

impl Role {
    /// All of them, in the order of views.
    pub const ALL: [Self; 3] = [Self::Router, Self::Attention, Self::Expert];

    /// The word for it in keys, records and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Attention => "attention",
            Self::Expert => "expert",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a member is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// Has claimed its cells and loads them.
    Loading,
    /// Takes work.
    Ready,
    /// Takes no new work.
    Leaving,
}

/// One member. Stored as JSON under `/conclave/<cluster>/members/<role>/<instance>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Unique among live members.
    pub instance: InstanceId,
    /// What it does.
    pub role: Role,
    /// Whether it takes work.
    pub state: MemberState,
    /// `http://host:port` of its gRPC server.
    pub address: String,
    /// Cells claimed or held, ascending; experts only.
    pub cells: Vec<CellId>,
    /// Of its checkpoint.
    pub fingerprint: String,
    /// What decides its bits; empty for routers.
    pub numerics: String,
    /// Routers: whether it hosts dispatch (attention replicas connect to those only).
    pub hosts_dispatch: bool,
    /// When it registered, milliseconds since the Unix epoch.
    pub since_ms: u64,
}

/// All members known at one moment, by role, then instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterView {
    /// Name of the cluster.
    pub cluster: String,
    /// Coordinator revision that this view is of.
    pub revision: i64,
    /// False while the coordinator cannot be reached: the view is then the last known one.
    pub reachable: bool,
    /// Everybody.
    pub members: Vec<Member>,
    /// Members among them whose record is gone without their having left: to be kept while their streams answer.
    pub unverified: Vec<InstanceId>,
}

impl ClusterView {
    /// The member with this id.
    pub fn member(&self, instance: &InstanceId) -> Option<&Member> {
        self.members.iter().find(|member| member.instance == *instance)
    }

    /// The members of one role.
    pub fn of(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.role == role)
    }

    /// The members of one role that take work.
    pub fn ready(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.of(role).filter(|member| member.state == MemberState::Ready)
    }

    /// Whether the coordinator holds the member's record, as far as is known.
    pub fn is_verified(&self, instance: &InstanceId) -> bool {
        !self.unverified.contains(instance)
    }

    /// The same moment with the members of one checkpoint only.
    pub fn of_checkpoint(&self, fingerprint: &str) -> Self {
        let mut view = self.clone();
        view.members.retain(|member| member.fingerprint == fingerprint);
        view
    }
}

#[cfg(test)]
pub(crate) mod fixture {
    use conclave_proto::GroupId;

    use super::*;

    pub(crate) fn cell(group: u32) -> CellId {
        CellId { span: 0, group: GroupId(group) }
    }

    pub(crate) fn cells(groups: &[u32]) -> Vec<CellId> {
        groups.iter().copied().map(cell).collect()
    }

    /// A ready expert of checkpoint `f` with these groups.
    pub(crate) fn expert(instance: &str, groups: &[u32]) -> Member {
        Member {
            instance: InstanceId(instance.into()),
            role: Role::Expert,
            state: MemberState::Ready,
            address: format!("http://{instance}:1"),
            cells: cells(groups),
            fingerprint: "f".into(),
            numerics: "reference-1".into(),
            hosts_dispatch: false,
            since_ms: 0,
        }
    }

    pub(crate) fn view(members: Vec<Member>) -> ClusterView {
        ClusterView { cluster: "test".into(), revision: 1, reachable: true, members, unverified: Vec::new() }
    }
}
