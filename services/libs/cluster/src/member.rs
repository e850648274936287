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

/// Where members of the same host reach one without the network stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SameHost {
    /// Names the host's boot: equal where it is the same machine, whatever the container.
    pub host: String,
    /// Name of an abstract Unix socket. Within another network namespace it cannot be reached.
    pub socket: String,
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
    /// Its way for members of the same host, if it offers one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_host: Option<SameHost>,
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

impl Member {
    /// Its socket, for a process on `host` that uses such; `None`: it is to be reached over TCP.
    pub fn socket_on(&self, host: Option<&str>) -> Option<&str> {
        let same = self.same_host.as_ref().filter(|same| host == Some(&same.host))?;
        Some(&same.socket)
    }
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
mod tests {
    use super::{SameHost, fixture};

    #[test]
    fn a_record_without_a_way_for_the_same_host_is_read() {
        let record = fixture::expert("a", &[0]);
        let written = serde_json::to_string(&record).unwrap();
        assert!(!written.contains("same_host"), "{written}");
        assert_eq!(serde_json::from_str::<super::Member>(&written).unwrap(), record);
        let same_host = Some(SameHost { host: "h".into(), socket: "s".into() });
        let record = super::Member { same_host, ..record };
        let read: super::Member = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(read, record);
    }

    #[test]
    fn a_socket_is_for_those_of_the_same_host_that_use_it() {
        let same_host = Some(SameHost { host: "here".into(), socket: "s".into() });
        let near = super::Member { same_host, ..fixture::expert("a", &[0]) };
        assert_eq!(near.socket_on(Some("here")), Some("s"));
        assert_eq!((near.socket_on(Some("there")), near.socket_on(None)), (None, None));
        assert_eq!(fixture::expert("b", &[0]).socket_on(Some("here")), None);
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
            same_host: None,
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
