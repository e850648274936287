//! The attention replicas: which there are, which one gets a sequence.

use std::{
    cmp::Reverse,
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use conclave_cluster::{ClusterView, Member, MemberState, Role};
use conclave_proto::{
    InstanceId,
    v1::{AttentionStatus, SequenceRequest, TokenEvent},
};
use conclave_serve::Error;
use futures::stream::BoxStream;
use tokio::{
    sync::{OnceCell, watch},
    time,
};

use super::{
    link::{AttentionConnector, AttentionLink},
    prefixes::Prefixes,
};

/// A replica that does not tell its state in this time is shown without one.
const STATUS_TIMEOUT: Duration = Duration::from_millis(500);

/// Everything the choice of a replica depends on besides the view.
#[derive(Debug, Default, Clone)]
pub(crate) struct Preference {
    /// Replicas that failed this sequence; taken only where there is no other.
    pub(crate) avoid: Vec<InstanceId>,
    /// Numerics id that the sequence began with.
    pub(crate) numerics: Option<String>,
    /// Beginnings of its prompt, as [`prefixes::chain`] names them.
    pub(crate) chain: Vec<u64>,
}

/// A replica with more than twice the sequences of the idlest, and this many more, is busy.
const SLACK: usize = 4;

/// What is believed of one replica.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Standing {
    /// Sequences of ours that run there.
    active: usize,
    /// Links of the prompt's chain that it has in its cache.
    cached: usize,
}

/// Chooses a ready replica of the checkpoint: not one to avoid, of the same numerics id, not much busier than the others,
/// with the most of the prompt in its cache, with the fewest sequences of ours, in this order of importance.
pub(crate) fn choose<'a>(
    view: &'a ClusterView,
    fingerprint: &'a str,
    preference: &Preference,
    standing: impl Fn(&InstanceId) -> Standing,
) -> Option<&'a Member> {
    let other = |member: &Member| preference.numerics.as_ref().is_some_and(|numerics| *numerics != member.numerics);
    let idlest = ready(view, fingerprint).map(|member| standing(&member.instance).active).min()?;
    ready(view, fingerprint).min_by_key(|member| {
        let Standing { active, cached } = standing(&member.instance);
        let (avoid, busy) = (preference.avoid.contains(&member.instance), active > 2 * idlest + SLACK);
        (avoid, other(member), busy, Reverse(cached), active, member.instance.clone())
    })
}

/// The attention replicas that take work for a checkpoint.
pub(crate) fn ready<'a>(view: &'a ClusterView, fingerprint: &'a str) -> impl Iterator<Item = &'a Member> {
    view.members.iter().filter(move |member| {
        member.role == Role::Attention && member.state == MemberState::Ready && member.fingerprint == fingerprint
    })
}

/// The replicas and our links to them.
pub(crate) struct Replicas {
    fingerprint: String,
    view: watch::Receiver<Arc<ClusterView>>,
    connector: Arc<dyn AttentionConnector>,
    known: Mutex<HashMap<InstanceId, Arc<Replica>>>,
    prefixes: Mutex<Prefixes>,
}

/// A replica, connected at its first use.
struct Replica {
    member: Member,
    link: OnceCell<Arc<dyn AttentionLink>>,
    active: AtomicUsize,
}

/// A sequence's place on a replica; counts as its load until dropped.
pub(crate) struct Place {
    replica: Arc<Replica>,
}

impl Replicas {
    pub(crate) fn new(
        fingerprint: String,
        view: watch::Receiver<Arc<ClusterView>>,
        connector: Arc<dyn AttentionConnector>,
    ) -> Self {
        Self { fingerprint, view, connector, known: Mutex::default(), prefixes: Mutex::default() }
    }

    /// The cluster as it is known now.
    pub(crate) fn view(&self) -> Arc<ClusterView> {
        self.view.borrow().clone()
    }

    /// A receiver of its changes.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.clone()
    }

    /// Takes a place on the replica chosen by [`choose`]; `None` while there is none.
    pub(crate) fn take(&self, preference: &Preference) -> Option<Place> {
        let view = self.view();
        let mut known = self.known();
        known.retain(|instance, replica| {
            view.members.iter().any(|m| m.instance == *instance && same(m, &replica.member))
        });
        let mut prefixes = self.prefixes.lock().unwrap_or_else(PoisonError::into_inner);
        let standing = |instance: &InstanceId| Standing {
            active: known.get(instance).map_or(0, |r| r.active.load(Ordering::Relaxed)),
            cached: prefixes.cached(&preference.chain, instance),
        };
        let member = choose(&view, &self.fingerprint, preference, standing)?;
        prefixes.remember(&preference.chain, &member.instance);
        let replica = known.entry(member.instance.clone()).or_insert_with(|| Arc::new(Replica::new(member))).clone();
        replica.active.fetch_add(1, Ordering::Relaxed);
        Some(Place { replica })
    }

    /// Forgets a replica's connection after it broke; the next use makes a new one.
    pub(crate) fn disconnect(&self, place: &Place) {
        let mut known = self.known();
        let instance = &place.replica.member.instance;
        if known.get(instance).is_some_and(|replica| Arc::ptr_eq(replica, &place.replica)) {
            known.remove(instance);
        }
    }

    /// Starts a sequence on the replica of a place.
    pub(crate) async fn generate(
        &self,
        place: &Place,
        request: SequenceRequest,
    ) -> Result<BoxStream<'static, Result<TokenEvent, Error>>, Error> {
        place.replica.link(&*self.connector).await?.generate(request).await
    }

    /// What a replica says of itself; `None` when it does not answer in time.
    pub(crate) async fn status(&self, member: &Member) -> Option<AttentionStatus> {
        let replica =
            self.known().entry(member.instance.clone()).or_insert_with(|| Arc::new(Replica::new(member))).clone();
        let ask = async { replica.link(&*self.connector).await?.status().await };
        time::timeout(STATUS_TIMEOUT, ask).await.ok()?.ok()
    }

    fn known(&self) -> MutexGuard<'_, HashMap<InstanceId, Arc<Replica>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    fn new(member: &Member) -> Self {
        Self { member: member.clone(), link: OnceCell::new(), active: AtomicUsize::new(0) }
    }

    async fn link(&self, connector: &dyn AttentionConnector) -> Result<&Arc<dyn AttentionLink>, Error> {
        self.link.get_or_try_init(|| connector.connect(&self.member)).await
    }
}

impl Place {
    pub(crate) fn instance(&self) -> &InstanceId {
        &self.replica.member.instance
    }

    pub(crate) fn numerics(&self) -> &str {
        &self.replica.member.numerics
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.replica.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether two records are of the same process: its state may differ.
fn same(a: &Member, b: &Member) -> bool {
    a.address == b.address && a.since_ms == b.since_ms && a.numerics == b.numerics
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(instance: &str, state: MemberState, fingerprint: &str, numerics: &str) -> Member {
        Member {
            instance: InstanceId(instance.to_owned()),
            role: Role::Attention,
            state,
            address: String::new(),
            same_host: None,
            cells: Vec::new(),
            fingerprint: fingerprint.to_owned(),
            numerics: numerics.to_owned(),
            hosts_dispatch: false,
            since_ms: 0,
        }
    }

    fn chosen(members: Vec<Member>, preference: &Preference, active: &[(&str, usize)]) -> Option<String> {
        let view = ClusterView { members, ..ClusterView::default() };
        let load = |id: &InstanceId| active.iter().find(|(name, _)| *name == id.0).map_or(0, |(_, load)| *load);
        let standing = |id: &InstanceId| Standing { active: load(id), cached: 0 };
        choose(&view, "f", preference, standing).map(|member| member.instance.0.clone())
    }

    #[test]
    fn a_cached_prefix_goes_before_the_load_up_to_a_point() {
        let view = ClusterView { members: three(), ..ClusterView::default() };
        let chosen = |active| {
            let standing = |id: &InstanceId| {
                if id.0 == "b" { Standing { active, cached: 3 } } else { Standing { active: 1, cached: 0 } }
            };
            choose(&view, "f", &Preference::default(), standing).map(|member| member.instance.0.clone())
        };
        assert_eq!(chosen(6).as_deref(), Some("b"));
        assert_eq!(chosen(7).as_deref(), Some("a"), "more than twice as many and four");
    }

    fn three() -> Vec<Member> {
        ["a", "b", "c"].map(|name| member(name, MemberState::Ready, "f", "n")).to_vec()
    }

    #[test]
    fn the_least_loaded_replica_is_chosen() {
        assert_eq!(chosen(three(), &Preference::default(), &[("a", 2), ("b", 1), ("c", 1)]).as_deref(), Some("b"));
    }

    #[test]
    fn only_ready_replicas_of_the_checkpoint_are() {
        let members = vec![
            member("a", MemberState::Loading, "f", "n"),
            member("b", MemberState::Leaving, "f", "n"),
            member("c", MemberState::Ready, "other", "n"),
        ];
        assert_eq!(chosen(members, &Preference::default(), &[]), None);
    }

    #[test]
    fn a_replica_to_avoid_is_the_last_resort() {
        let avoid = |names: &[&str]| Preference {
            avoid: names.iter().map(|name| InstanceId((*name).to_owned())).collect(),
            ..Preference::default()
        };
        assert_eq!(chosen(three(), &avoid(&["a"]), &[("b", 5), ("c", 6)]).as_deref(), Some("b"));
        assert_eq!(chosen(three(), &avoid(&["a", "b", "c"]), &[]).as_deref(), Some("a"));
    }

    #[test]
    fn the_numerics_id_goes_before_the_load() {
        let members = vec![member("a", MemberState::Ready, "f", "x"), member("b", MemberState::Ready, "f", "n")];
        let preference = Preference { numerics: Some("n".to_owned()), ..Preference::default() };
        assert_eq!(chosen(members, &preference, &[("b", 9)]).as_deref(), Some("b"));
    }
}
