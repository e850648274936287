//! Who has which cell: what dispatch plans with.

use std::collections::BTreeMap;

use conclave_proto::CellId;

use crate::{CellShape, ClusterView, Member, Role};

/// A ready expert of the right checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its record.
    pub member: Member,
    /// False when its record is gone: to be dropped when its stream fails.
    pub verified: bool,
}

/// The ready experts of one checkpoint by cell, and the ones of other checkpoints. Pure: made anew from each view.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CellMap {
    replicas: Vec<Replica>,
    by_cell: BTreeMap<CellId, Vec<usize>>,
    refused: Vec<Member>,
}

impl CellMap {
    /// The map of `view` for a process that serves the checkpoint `fingerprint`.
    pub fn from(view: &ClusterView, fingerprint: &str) -> Self {
        let refused = view.of(Role::Expert).filter(|member| member.fingerprint != fingerprint).cloned().collect();
        let mut map = Self { refused, ..Self::default() };
        for member in view.ready(Role::Expert).filter(|member| member.fingerprint == fingerprint) {
            for cell in &member.cells {
                map.by_cell.entry(*cell).or_default().push(map.replicas.len());
            }
            let verified = view.is_verified(&member.instance);
            map.replicas.push(Replica { member: member.clone(), verified });
        }
        map
    }

    /// The replicas of a cell, by instance; none for a cell that nobody has.
    pub fn replicas(&self, cell: CellId) -> impl ExactSizeIterator<Item = &Replica> {
        self.by_cell.get(&cell).map_or(&[][..], Vec::as_slice).iter().map(|index| &self.replicas[*index])
    }

    /// Every replica once, by instance.
    pub fn shards(&self) -> &[Replica] {
        &self.replicas
    }

    /// Experts of another checkpoint, in any state: never used. Whoever sees one for the first time says so in its log.
    pub fn refused(&self) -> &[Member] {
        &self.refused
    }

    /// Cells of the model that nobody has, ascending: not empty means that the model cannot be served whole.
    pub fn missing(&self, shape: CellShape) -> Vec<CellId> {
        shape.cells().filter(|cell| !self.by_cell.contains_key(cell)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemberState;
    use crate::member::fixture::{cell, cells, expert, view};

    fn holders(map: &CellMap, group: u32) -> Vec<&str> {
        map.replicas(cell(group)).map(|replica| replica.member.instance.0.as_str()).collect()
    }

    #[test]
    fn ready_experts_of_the_checkpoint_are_replicas() {
        let mut loading = expert("c", &[2]);
        loading.state = MemberState::Loading;
        let mut leaving = expert("d", &[2]);
        leaving.state = MemberState::Leaving;
        let map = CellMap::from(&view(vec![expert("a", &[0, 1]), expert("b", &[1]), loading, leaving]), "f");
        assert_eq!(holders(&map, 0), ["a"]);
        assert_eq!(holders(&map, 1), ["a", "b"]);
        assert!(holders(&map, 2).is_empty());
        assert_eq!(map.shards().len(), 2);
        assert_eq!(map.missing(CellShape { groups: 4, spans: 1 }), cells(&[2, 3]));
    }

    #[test]
    fn another_checkpoint_is_refused() {
        let mut other = expert("x", &[0]);
        other.fingerprint = "other".into();
        let map = CellMap::from(&view(vec![expert("a", &[1]), other.clone()]), "f");
        assert!(holders(&map, 0).is_empty());
        assert_eq!(map.refused(), [other]);
        assert_eq!(holders(&CellMap::from(&view(vec![expert("a", &[1])]), "other"), 1), [""; 0]);
    }

    #[test]
    fn an_unverified_replica_stays_and_says_so() {
        let mut view = view(vec![expert("a", &[0]), expert("b", &[0])]);
        view.unverified = vec![view.members[1].instance.clone()];
        let verified: Vec<bool> = CellMap::from(&view, "f").replicas(cell(0)).map(|replica| replica.verified).collect();
        assert_eq!(verified, [true, false]);
    }
}
