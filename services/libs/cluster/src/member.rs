//! A member of the cluster, as it stands in the coordinator, and the view of all of them.

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
}
