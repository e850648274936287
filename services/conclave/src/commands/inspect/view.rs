//! A running cluster as it is shown. Pure: made of what a router answers.

use std::{collections::BTreeMap, ops::RangeInclusive};

use conclave_proto::{CellId, GroupId, v1};
use serde::Serialize;

use super::warnings;

/// Roles in the order of a token's way.
pub const ROLES: [&str; 3] = ["router", "attention", "expert"];

/// Everything that is shown of a cluster; its JSON is what `--json` prints.
#[derive(Debug, Serialize)]
pub struct View {
    /// The router that was asked.
    pub url: String,
    pub cluster: String,
    /// Whether that router reaches the coordinator; if not, this is the last known map.
    pub coordinator_reachable: bool,
    pub model: ServedModel,
    /// What a person should look at.
    pub warnings: Vec<String>,
    pub members: Vec<Member>,
    pub cells: Vec<Cell>,
}

/// The model that the router serves.
#[derive(Debug, Serialize)]
pub struct ServedModel {
    pub id: String,
    pub fingerprint: String,
    pub context_limit: u32,
}

/// One member.
#[derive(Debug, Clone, Serialize)]
pub struct Member {
    pub role: String,
    pub instance: String,
    pub state: String,
    pub address: String,
    /// As flags spell it: `0-3,5`.
    pub cells: String,
    /// Experts: queued rows; attention: running and waiting sequences.
    pub load: u32,
    pub health: String,
    pub numerics: String,
    pub fingerprint: String,
    pub age_ms: u64,
}

/// One cell with its replicas.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub cell: String,
    /// Members that are ready to compute it.
    pub ready: usize,
    pub replicas: Vec<Replica>,
    /// (row, expert) pairs that the router sent to it.
    pub rows: u64,
    /// Of all rows; 0 where there are none.
    pub share: f64,
}

/// A member that holds a cell or is about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replica {
    pub instance: String,
    pub state: String,
}

impl View {
    /// What a router at `url` says of its cluster and its model.
    pub fn new(url: &str, cluster: v1::Cluster, model: v1::Model) -> Self {
        let members: Vec<Member> = cluster.members.into_iter().map(Member::new).collect();
        let cells = cells(&cluster.cells, model.groups, &members, &model.fingerprint);
        let mut view = Self {
            url: url.to_owned(),
            cluster: cluster.name,
            coordinator_reachable: cluster.coordinator_reachable,
            model: ServedModel { id: model.id, fingerprint: model.fingerprint, context_limit: model.context_limit },
            warnings: Vec::new(),
            members,
            cells,
        };
        view.warnings = warnings::of(&view);
        view
    }

    /// The members of one role, in the order in which they were told.
    pub fn of(&self, role: &str) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.role == role)
    }

    /// Whether a member has the checkpoint that the router serves; others get no work.
    pub fn is_ours(&self, member: &Member) -> bool {
        member.fingerprint == self.model.fingerprint
    }

    /// Numerics ids of the members that take work, ascending.
    pub fn numerics(&self) -> Vec<&str> {
        let ready = self.members.iter().filter(|member| member.is_ready() && self.is_ours(member));
        let computing = ready.filter(|member| !member.numerics.is_empty());
        let mut ids: Vec<&str> = computing.map(|member| member.numerics.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

impl Member {
    fn new(member: v1::ClusterMember) -> Self {
        Self {
            role: member.role,
            instance: member.instance,
            state: member.state,
            address: member.address,
            cells: spelled(&member.cells.into_iter().map(CellId::from).collect::<Vec<_>>()),
            load: member.load,
            health: member.health,
            numerics: member.numerics,
            fingerprint: member.fingerprint,
            age_ms: member.age_ms,
        }
    }

    /// Whether it takes work.
    pub fn is_ready(&self) -> bool {
        self.state == "ready"
    }
}

/// The cells of the model and any others that are claimed. A member of another checkpoint is no replica.
fn cells(claimed: &[v1::CellReplicas], groups: u32, members: &[Member], fingerprint: &str) -> Vec<Cell> {
    let known: BTreeMap<CellId, &v1::CellReplicas> =
        claimed.iter().filter_map(|claim| Some((claim.cell?.into(), claim))).collect();
    let spans = known.keys().map(|cell| cell.span).max().unwrap_or(0);
    let of_model = (0..=spans).flat_map(|span| (0..groups).map(move |group| CellId { span, group: GroupId(group) }));
    let mut ids: Vec<CellId> = of_model.chain(known.keys().copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    let total: u64 = claimed.iter().map(|claim| claim.rows).sum();
    let cell = |id: CellId| {
        let claim = known.get(&id);
        let holders = claim.into_iter().flat_map(|claim| &claim.instances);
        let holder = |instance: &String| members.iter().find(|member| member.instance == *instance);
        let ours = holders.filter_map(holder).filter(|member| member.fingerprint == fingerprint);
        let replica = |member: &Member| Replica { instance: member.instance.clone(), state: member.state.clone() };
        let replicas: Vec<Replica> = ours.map(replica).collect();
        let rows = claim.map_or(0, |claim| claim.rows);
        Cell {
            cell: id.to_string(),
            ready: replicas.iter().filter(|replica| replica.state == "ready").count(),
            replicas,
            rows,
            share: rows as f64 / total.max(1) as f64,
        }
    };
    ids.into_iter().map(cell).collect()
}

/// Cells as flags spell them, neighbours as a range.
fn spelled(cells: &[CellId]) -> String {
    let mut ranges: Vec<(u32, RangeInclusive<u32>)> = Vec::new();
    for cell in cells {
        let group = cell.group.0;
        match ranges.last_mut() {
            Some((span, range)) if *span == cell.span && range.end() + 1 == group => *range = *range.start()..=group,
            _ => ranges.push((cell.span, group..=group)),
        }
    }
    let one = |(span, range): &(u32, RangeInclusive<u32>)| {
        let id = |group: &u32| CellId { span: *span, group: GroupId(*group) }.to_string();
        let (first, last) = (id(range.start()), id(range.end()));
        if first == last { first } else { format!("{first}-{last}") }
    };
    ranges.iter().map(one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn member(role: &str, instance: &str) -> v1::ClusterMember {
        v1::ClusterMember {
            instance: instance.into(),
            role: role.into(),
            address: "http://127.0.0.1:7000".into(),
            state: "ready".into(),
            fingerprint: "f00d".repeat(16),
            numerics: if role == "router" { String::new() } else { "cpu-avx2-3".into() },
            cells: Vec::new(),
            age_ms: 90_000,
            load: 0,
            health: if role == "router" { "unknown".into() } else { "ok".into() },
            host: String::new(),
            socket: String::new(),
        }
    }

    pub fn expert(instance: &str, groups: &[u32]) -> v1::ClusterMember {
        let cells = groups.iter().map(|group| v1::Cell { group: *group, span: 0 }).collect();
        v1::ClusterMember { cells, ..member("expert", instance) }
    }

    /// A cluster of these members, whose cells got `100 × (group + 1)` rows each, under a model of four groups.
    pub fn view(members: Vec<v1::ClusterMember>) -> View {
        let mut cells: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for member in &members {
            for cell in &member.cells {
                cells.entry(cell.group).or_default().push(member.instance.clone());
            }
        }
        let cells = cells.into_iter().map(|(group, instances)| v1::CellReplicas {
            cell: Some(v1::Cell { group, span: 0 }),
            instances,
            rows: 100 * u64::from(group + 1),
        });
        let cluster =
            v1::Cluster { name: "default".into(), coordinator_reachable: true, cells: cells.collect(), members };
        let model = v1::Model { id: "demo".into(), fingerprint: "f00d".repeat(16), groups: 4, ..Default::default() };
        View::new("http://127.0.0.1:50051", cluster, model)
    }

    /// Two shards with two cells each, and the other parts.
    pub fn healthy() -> Vec<v1::ClusterMember> {
        vec![
            member("router", "router-1"),
            member("attention", "attention-1"),
            expert("expert-1", &[0, 1]),
            expert("expert-2", &[2, 3]),
        ]
    }

    #[test]
    fn cells_are_spelled_as_ranges() {
        let cells = |groups: &[u32]| groups.iter().map(|g| CellId { span: 0, group: GroupId(*g) }).collect::<Vec<_>>();
        assert_eq!(spelled(&cells(&[0, 1, 2, 5, 7, 8])), "0-2,5,7-8");
        assert_eq!((spelled(&[]), spelled(&cells(&[3]))), (String::new(), "3".into()));
        let spans = [0, 1].map(|span| CellId { span, group: GroupId(4) });
        assert_eq!(spelled(&spans), "4,4/1");
    }

    #[test]
    fn cells_have_their_replicas_and_their_share() {
        let mut members = healthy();
        members.push(v1::ClusterMember { state: "loading".into(), ..expert("expert-3", &[0]) });
        members.push(v1::ClusterMember { fingerprint: "other".into(), ..expert("expert-4", &[1]) });
        let view = view(members);
        assert_eq!(view.cells.iter().map(|cell| cell.ready).collect::<Vec<_>>(), [1, 1, 1, 1]);
        assert_eq!((view.cells[0].replicas.len(), view.cells[1].replicas.len()), (2, 1));
        assert_eq!((view.cells[3].rows, view.cells[3].share), (400, 0.4));
        assert_eq!(view.members[2].cells, "0-1");
        assert_eq!(view.numerics(), ["cpu-avx2-3"]);
    }

    #[test]
    fn a_cell_that_nobody_claims_is_there_without_replicas() {
        let view = view(vec![expert("expert-1", &[0, 2])]);
        assert_eq!(view.cells.iter().map(|cell| cell.ready).collect::<Vec<_>>(), [1, 0, 1, 0]);
    }
}
