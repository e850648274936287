//! What a process knows about the members, merged from snapshots and events. Pure: the caller passes the time in.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use conclave_proto::InstanceId;

use crate::{ClusterView, Member, MemberState, Role};

type Key = (Role, InstanceId);

#[derive(Debug, Clone)]
struct Known {
    member: Member,
    /// Since when the coordinator has no record of it.
    missing: Option<Instant>,
}

/// The members known to one process. A record that disappears makes its member unverified; only leaving, a successor at
/// the same address or `keep` without a record removes it.
#[derive(Debug, Clone)]
pub(crate) struct Roster {
    cluster: String,
    keep: Duration,
    revision: i64,
    reachable: bool,
    known: BTreeMap<Key, Known>,
}

impl Roster {
    /// Nobody; unverified members will be kept for `keep`.
    pub(crate) fn new(cluster: &str, keep: Duration) -> Self {
        Self { cluster: cluster.to_owned(), keep, revision: 0, reachable: false, known: BTreeMap::new() }
    }

    /// All records there are, as of `revision`.
    pub(crate) fn snapshot(&mut self, revision: i64, members: Vec<Member>, now: Instant) {
        (self.revision, self.reachable) = (revision, true);
        let found: Vec<Key> = members.iter().map(key).collect();
        members.into_iter().for_each(|member| self.insert(member));
        let gone: Vec<Key> = self.known.keys().filter(|key| !found.contains(key)).cloned().collect();
        gone.into_iter().for_each(|key| self.remove(&key, now));
    }

    /// A record was written at `revision`.
    pub(crate) fn put(&mut self, revision: i64, member: Member) {
        self.revision = revision;
        self.insert(member);
    }

    /// A record was deleted at `revision`, by its member or by its lease.
    pub(crate) fn delete(&mut self, revision: i64, role: Role, instance: InstanceId, now: Instant) {
        self.revision = revision;
        self.remove(&(role, instance), now);
    }

    /// The coordinator does not answer: everything stays as it is.
    pub(crate) fn unreachable(&mut self) {
        self.reachable = false;
    }

    /// Drops the members that have been without a record for too long; says whether there were any. While the coordinator
    /// does not answer nobody's time runs out.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let (before, keep) = (self.known.len(), self.keep);
        if self.reachable {
            self.known.retain(|_, known| known.missing.is_none_or(|since| now < since + keep));
        }
        self.known.len() < before
    }

    /// The view for everybody else.
    pub(crate) fn view(&self) -> ClusterView {
        let unverified = self.known.values().filter(|known| known.missing.is_some());
        ClusterView {
            cluster: self.cluster.clone(),
            revision: self.revision,
            reachable: self.reachable,
            members: self.known.values().map(|known| known.member.clone()).collect(),
            unverified: unverified.map(|known| known.member.instance.clone()).collect(),
        }
    }

    fn insert(&mut self, member: Member) {
        let key = key(&member);
        let replaced = |other: &Key, known: &Known| {
            *other != key && known.missing.is_some() && known.member.address == member.address
        };
        self.known.retain(|other, known| !replaced(other, known));
        self.known.insert(key, Known { member, missing: None });
    }

    fn remove(&mut self, key: &Key, now: Instant) {
        let Some(known) = self.known.get_mut(key) else { return };
        if known.member.state == MemberState::Leaving {
            self.known.remove(key);
        } else {
            known.missing.get_or_insert(now);
        }
    }
}

fn key(member: &Member) -> Key {
    (member.role, member.instance.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::fixture::expert;

    const KEEP: Duration = Duration::from_secs(50);

    /// Ids in the view, with a `?` behind the unverified ones.
    fn ids(roster: &Roster) -> Vec<String> {
        let view = roster.view();
        let mark = |member: &Member| if view.is_verified(&member.instance) { "" } else { "?" };
        view.members.iter().map(|member| format!("{}{}", member.instance, mark(member))).collect()
    }

    fn roster(now: Instant) -> Roster {
        let mut roster = Roster::new("test", KEEP);
        roster.snapshot(5, vec![expert("a", &[0]), expert("b", &[1])], now);
        roster
    }

    fn delete(roster: &mut Roster, instance: &str, now: Instant) {
        roster.delete(9, Role::Expert, InstanceId(instance.into()), now);
    }

    #[test]
    fn a_gap_in_a_snapshot_is_unverified_until_the_record_is_back() {
        let now = Instant::now();
        let mut roster = roster(now);
        roster.snapshot(1, vec![expert("b", &[1])], now);
        assert_eq!(ids(&roster), ["a?", "b"], "an emptied coordinator removes nobody");
        roster.put(2, expert("a", &[0, 7]));
        assert_eq!(ids(&roster), ["a", "b"]);
        assert_eq!(roster.view().members[0].cells.len(), 2, "the newer record counts");
        assert_eq!(roster.view().revision, 2);
    }

    #[test]
    fn a_deleted_record_is_unverified_and_runs_out() {
        let now = Instant::now();
        let mut roster = roster(now);
        delete(&mut roster, "a", now);
        delete(&mut roster, "a", now + KEEP / 2);
        assert_eq!(ids(&roster), ["a?", "b"]);
        assert!(!roster.expire(now + KEEP - Duration::from_secs(1)));
        assert!(roster.expire(now + KEEP), "counted from the first sign");
        assert_eq!(ids(&roster), ["b"]);
    }

    #[test]
    fn only_leaving_removes_at_once() {
        let now = Instant::now();
        let mut roster = roster(now);
        roster.put(8, Member { state: MemberState::Leaving, ..expert("a", &[0]) });
        assert_eq!(ids(&roster), ["a", "b"], "it finishes what it has");
        delete(&mut roster, "a", now);
        assert_eq!(ids(&roster), ["b"]);
        delete(&mut roster, "never there", now);
        assert_eq!(ids(&roster), ["b"]);
    }

    #[test]
    fn a_successor_at_the_same_address_replaces_an_unverified_member() {
        let now = Instant::now();
        let mut roster = roster(now);
        let successor = |id: &str| Member { address: "http://a:1".into(), ..expert(id, &[0]) };
        roster.put(8, successor("c"));
        assert_eq!(ids(&roster), ["a", "b", "c"], "two live records are both kept");
        delete(&mut roster, "a", now);
        roster.put(10, successor("c"));
        assert_eq!(ids(&roster), ["b", "c"]);
    }

    #[test]
    fn while_the_coordinator_is_away_everything_stays() {
        let now = Instant::now();
        let mut roster = roster(now);
        delete(&mut roster, "a", now);
        roster.unreachable();
        assert!(!roster.expire(now + KEEP * 2));
        assert_eq!(ids(&roster), ["a?", "b"]);
        assert!(!roster.view().reachable);
        roster.snapshot(20, vec![expert("a", &[0]), expert("b", &[1])], now + KEEP * 2);
        assert!(!roster.expire(now + KEEP * 2));
        assert_eq!(ids(&roster), ["a", "b"]);
        assert!(roster.view().reachable);
    }
}
