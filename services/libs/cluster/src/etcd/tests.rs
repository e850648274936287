//! Against a real etcd.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError, Weak};

use conclave_proto::{CellId, InstanceId};
use etcd_client::Client;
use tokio::time::timeout;

use super::watcher::Gap;
use super::*;
use crate::member::fixture::{cells, expert};
use crate::testing::Etcd;
use crate::{CellChoice, CellShape, Loads, MemberState, Role, choose};

const TTL: Duration = Duration::from_secs(2);
/// Far longer than anything here takes: only a test that fails waits so long.
const LIMIT: Duration = Duration::from_secs(40);

/// One etcd for the tests that do it no harm; each has a cluster of its own in it.
fn shared(test: &str) -> Option<Arc<Etcd>> {
    static SHARED: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(etcd) = shared.upgrade() {
        return Some(etcd);
    }
    let etcd = Arc::new(Etcd::start_or_skip(test)?);
    *shared = Arc::downgrade(&etcd);
    Some(etcd)
}

async fn join(etcd: &Etcd, cluster: &str) -> EtcdMembership {
    let config = EtcdConfig::new(vec![etcd.url()], cluster, TTL);
    EtcdMembership::connect(config).await.expect("etcd is up")
}

fn always(member: Member) -> MakeMember {
    Arc::new(move |_| Ok(member.clone()))
}

/// Waits for a view in which `holds`; panics with the last view if there is none in time.
async fn until(cluster: &EtcdMembership, what: &str, holds: impl Fn(&ClusterView) -> bool) -> Arc<ClusterView> {
    let mut watch = cluster.watch();
    let found = timeout(LIMIT, watch.wait_for(|view| holds(view))).await;
    match found {
        Ok(view) => view.expect("the watch goes on").clone(),
        Err(_) => panic!("{what}: not seen; the last view: {:?}", cluster.watch().borrow()),
    }
}

/// Ids, with a `?` behind the unverified ones.
fn ids(view: &ClusterView) -> Vec<String> {
    let mark = |instance: &InstanceId| if view.is_verified(instance) { "" } else { "?" };
    view.members.iter().map(|member| format!("{}{}", member.instance, mark(&member.instance))).collect()
}

#[tokio::test]
async fn members_join_change_and_leave() {
    let Some(etcd) = shared("members_join_change_and_leave") else { return };
    let (one, two) = (join(&etcd, "come-and-go").await, join(&etcd, "come-and-go").await);
    let a = one.register(always(expert("a", &[0, 1]))).await.expect("free");
    let view = until(&two, "a joins", |view| ids(view) == ["a"]).await;
    assert_eq!(view.members, [expert("a", &[0, 1])]);
    let b = two.register(always(expert("b", &[2]))).await.expect("free");
    until(&one, "b joins", |view| ids(view) == ["a", "b"]).await;

    a.set_state(MemberState::Leaving).await.expect("etcd is up");
    assert_eq!(a.member().state, MemberState::Leaving);
    until(&two, "a says that it leaves", |view| view.ready(Role::Expert).count() == 1).await;
    a.leave().await.expect("etcd is up");
    until(&two, "a has left", |view| ids(view) == ["b"]).await;
    assert!(a.set_state(MemberState::Ready).await.is_err(), "it is over");

    b.leave().await.expect("etcd is up");
    until(&one, "a ready member leaves at once, too", |view| view.members.is_empty()).await;
    let late = join(&etcd, "come-and-go").await;
    assert!(late.watch().borrow().members.is_empty() && late.watch().borrow().reachable);
}

#[tokio::test]
async fn clusters_do_not_see_each_other() {
    let Some(etcd) = shared("clusters_do_not_see_each_other") else { return };
    let (long, short) = (join(&etcd, "blue-2").await, join(&etcd, "blue").await);
    let _a = long.register(always(expert("a", &[0]))).await.expect("free");
    let _b = short.register(always(expert("a", &[0]))).await.expect("free in the other cluster");
    let late = join(&etcd, "blue").await;
    assert_eq!(ids(&late.watch().borrow()), ["a"]);
}

#[tokio::test]
async fn an_id_is_refused_while_its_holder_lives_whatever_its_role() {
    let Some(etcd) = shared("an_id_is_refused_while_its_holder_lives_whatever_its_role") else { return };
    let cluster = join(&etcd, "taken").await;
    let held = cluster.register(always(expert("a", &[0]))).await.expect("free");
    let same = cluster.register(always(expert("a", &[1])));
    let router = cluster.register(always(Member { role: Role::Router, ..expert("a", &[]) }));
    let (same, router) = futures::future::join(same, router).await;
    for refused in [same, router] {
        let error = refused.err().expect("taken").to_string();
        assert!(error.contains("instance a: already registered by a live expert at http://a:1"), "{error}");
    }
    assert_eq!(cluster.watch().borrow().members, [expert("a", &[0])]);
    drop(held);
}

#[tokio::test]
async fn a_quick_restart_takes_its_id_back_when_the_lease_ends() {
    let Some(etcd) = shared("a_quick_restart_takes_its_id_back_when_the_lease_ends") else { return };
    let (cluster, other) = (join(&etcd, "restart").await, join(&etcd, "restart").await);
    // Dropped without leaving: what kill -9 looks like from outside.
    drop(cluster.register(always(expert("a", &[0]))).await.expect("free"));
    let again = cluster.register(always(Member { since_ms: 7, ..expert("a", &[1]) })).await.expect("after its lease");
    let view = until(&other, "the successor", |view| view.members.iter().any(|member| member.since_ms == 7)).await;
    assert_eq!(ids(&view), ["a"]);
    drop(again);
}

#[tokio::test]
async fn a_dead_member_is_unverified_when_its_lease_ends() {
    let Some(etcd) = shared("a_dead_member_is_unverified_when_its_lease_ends") else { return };
    let (cluster, other) = (join(&etcd, "dead").await, join(&etcd, "dead").await);
    let a = cluster.register(always(expert("a", &[0]))).await.expect("free");
    let _b = cluster.register(always(expert("b", &[1]))).await.expect("free");
    until(&other, "both", |view| ids(view) == ["a", "b"]).await;
    drop(a);
    let view = until(&other, "the lease ends", |view| !view.unverified.is_empty()).await;
    assert_eq!(ids(&view), ["a?", "b"], "kept, for its stream may still answer");
    let late = join(&etcd, "dead").await;
    assert_eq!(ids(&late.watch().borrow()), ["b"], "who comes later does not know it");
}

#[tokio::test]
async fn a_record_deleted_by_hand_is_written_again() {
    let Some(etcd) = shared("a_record_deleted_by_hand_is_written_again") else { return };
    let (cluster, other) = (join(&etcd, "by-hand").await, join(&etcd, "by-hand").await);
    let a = cluster.register(always(expert("a", &[0]))).await.expect("free");
    let before = until(&other, "a", |view| ids(view) == ["a"]).await.revision;
    let mut raw = Client::connect([etcd.url()], None).await.expect("etcd is up");
    raw.delete("/conclave/by-hand/members/expert/a", None).await.expect("etcd is up");
    until(&other, "a is back", |view| view.revision > before + 1 && ids(view) == ["a"]).await;
    drop(a);
}

#[tokio::test]
async fn an_id_taken_over_meanwhile_is_a_failure_of_the_process() {
    let Some(etcd) = shared("an_id_taken_over_meanwhile_is_a_failure_of_the_process") else { return };
    let cluster = join(&etcd, "usurped").await;
    let a = cluster.register(always(expert("a", &[0]))).await.expect("free");
    let usurper = Member { address: "http://elsewhere:1".into(), ..expert("a", &[5]) };
    let mut raw = Client::connect([etcd.url()], None).await.expect("etcd is up");
    let record = record::encode(&usurper).expect("plain data");
    raw.put("/conclave/usurped/members/expert/a", record, None).await.expect("etcd is up");

    let error = a.set_state(MemberState::Leaving).await.expect_err("the record is another's").to_string();
    assert!(error.contains("http://elsewhere:1"), "{error}");
    let failure = timeout(LIMIT, cluster.failed()).await.expect("the process is told").to_string();
    assert!(failure.contains("registration: instance a: already registered"), "{failure}");
    let view = until(&cluster, "the usurper", |view| view.members == [usurper.clone()]).await;
    assert_eq!(ids(&view), ["a"], "its record is untouched");
}

#[tokio::test]
async fn compacted_revisions_are_a_gap_that_a_snapshot_fills() {
    let Some(etcd) = shared("compacted_revisions_are_a_gap_that_a_snapshot_fills") else { return };
    let cluster = join(&etcd, "compacted").await;
    let store = cluster.inner.store.clone();
    let old = store.snapshot().await.expect("etcd is up");
    let from = old.revision + 1;
    let mut watcher = Watcher::new(store.clone(), Roster::new("compacted", TTL), TTL);
    watcher.begin(old);

    let a = cluster.register(always(expert("a", &[0]))).await.expect("free");
    a.set_state(MemberState::Loading).await.expect("etcd is up");
    let now = store.snapshot().await.expect("etcd is up").revision;
    let mut raw = Client::connect([etcd.url()], None).await.expect("etcd is up");
    raw.compact(now, None).await.expect("etcd is up");

    assert_eq!(timeout(LIMIT, watcher.follow(from)).await.expect("etcd says so"), Gap::Compacted);
    let view = watcher.subscribe();
    let alarm = Alarm::new("watch", watch::Sender::new(None));
    let task = tokio::spawn(watcher.run(from, alarm));
    let mut view_after = view.clone();
    let seen = timeout(LIMIT, view_after.wait_for(|view| ids(view) == ["a"])).await;
    assert_eq!(seen.expect("a snapshot follows").expect("it goes on").members[0].state, MemberState::Loading);
    task.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_experts_at_once_cover_all_cells() {
    let Some(etcd) = shared("four_experts_at_once_cover_all_cells") else { return };
    let shape = CellShape { groups: 8, spans: 1 };
    for round in 0..3 {
        let name = format!("auto-{round}");
        let mut joins = Vec::new();
        for i in 0..4 {
            let cluster = join(&etcd, &name).await;
            let make: MakeMember = Arc::new(move |view| {
                let cells = choose(&CellChoice::Auto(Some(2)), shape, view, &Loads::new(), 8)?;
                Ok(Member { cells, ..expert(&format!("e{i}"), &[]) })
            });
            joins.push(tokio::spawn(async move { cluster.register(make).await.expect("a place") }));
        }
        let registrations = futures::future::join_all(joins).await;
        let mut replicas: BTreeMap<CellId, usize> = BTreeMap::new();
        for registration in &registrations {
            let member = registration.as_ref().expect("no panic").member();
            assert_eq!(member.cells.len(), 2);
            member.cells.into_iter().for_each(|cell| *replicas.entry(cell).or_default() += 1);
        }
        let even: BTreeMap<CellId, usize> = shape.cells().map(|cell| (cell, 1)).collect();
        assert_eq!(replicas, even, "round {round}");
    }
}

#[tokio::test]
async fn one_of_two_endpoints_is_enough() {
    let Some(etcd) = shared("one_of_two_endpoints_is_enough") else { return };
    let config = EtcdConfig::new(vec![closed_port(), etcd.url()], "two", TTL);
    let cluster = EtcdMembership::connect(config).await.expect("one is up");
    let a = cluster.register(always(expert("a", &[0]))).await.expect("one is up");
    until(&cluster, "a", |view| ids(view) == ["a"]).await;
    a.leave().await.expect("one is up");
}

fn closed_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    format!("http://{}", listener.local_addr().expect("bound"))
}

#[tokio::test]
async fn nobody_there_is_said_at_start_with_the_endpoints() {
    let endpoints = vec![closed_port(), closed_port()];
    let config = EtcdConfig::new(endpoints.clone(), "nobody", TTL);
    let refused = timeout(LIMIT, EtcdMembership::connect(config)).await.expect("within its limit");
    let error = refused.err().expect("nobody is there");
    assert!(matches!(error, ClusterError::Unreachable { .. }));
    let error = error.to_string();
    assert!(endpoints.iter().all(|endpoint| error.contains(endpoint)), "{error}");
    assert!(error.contains("refused"), "the cause is named: {error}");
}

#[tokio::test]
async fn an_etcd_that_starts_later_is_waited_for() {
    let Some(mut etcd) = Etcd::start_or_skip("an_etcd_that_starts_later_is_waited_for") else { return };
    etcd.kill();
    let config = EtcdConfig { timeout: Duration::from_millis(500), ..EtcdConfig::new(vec![etcd.url()], "late", TTL) };
    let waiting = tokio::spawn(EtcdMembership::connect(EtcdConfig { patience: LIMIT, ..config }));
    sleep(Duration::from_secs(2)).await;
    assert!(!waiting.is_finished(), "several calls have failed meanwhile");
    etcd.restart(true).expect("it comes up");
    let cluster = timeout(LIMIT, waiting).await.expect("soon").expect("no panic").expect("etcd is up");
    let _a = cluster.register(always(expert("a", &[0]))).await.expect("free");
    until(&cluster, "a", |view| ids(view) == ["a"]).await;
}

#[tokio::test]
async fn patience_ends_with_the_last_cause_and_the_time() {
    let url = closed_port();
    let config = EtcdConfig::new(vec![url.clone()], "nobody", TTL);
    let (timeout, patience) = (Duration::from_millis(400), Duration::from_millis(1500));
    let refused = EtcdMembership::connect(EtcdConfig { timeout, patience, ..config }).await;
    let error = refused.err().expect("nobody is there").to_string();
    assert!(error.contains(&url) && error.contains("refused"), "{error}");
    let waited = error.split_once("gave up after ").expect("the time").1.trim_end_matches(" s");
    assert!(waited.parse::<f64>().expect("seconds") >= 1.0, "longer than one call: {error}");
}

#[tokio::test]
async fn a_machine_that_accepts_and_says_nothing_is_said_at_start() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let config = EtcdConfig::new(vec![url.clone()], "silent", TTL);
    let refused = timeout(LIMIT, EtcdMembership::connect(config)).await.expect("within its limit");
    let error = refused.err().expect("nobody answers").to_string();
    assert!(error.contains(&url), "{error}");
}

#[tokio::test]
async fn an_emptied_etcd_is_filled_again() {
    let Some(mut etcd) = Etcd::start_or_skip("an_emptied_etcd_is_filled_again") else { return };
    let (one, two) = (join(&etcd, "emptied").await, join(&etcd, "emptied").await);
    let a = one.register(always(expert("a", &[0, 3]))).await.expect("free");
    let _b = two.register(always(expert("b", &[1]))).await.expect("free");
    until(&one, "both", |view| ids(view) == ["a", "b"]).await;

    etcd.kill();
    let away = until(&two, "etcd is gone", |view| !view.reachable).await;
    assert_eq!(ids(&away), ["a", "b"], "served from the last map");
    let error = a.set_state(MemberState::Loading).await.expect_err("nobody to write to");
    assert!(matches!(error, ClusterError::Unreachable { .. }), "{error}");

    etcd.restart(false).expect("it comes up");
    let back = |view: &ClusterView| view.reachable && ids(view) == ["a", "b"];
    let view = until(&two, "both registered again", back).await;
    assert_eq!(view.members[0].cells, cells(&[0, 3]), "with the cells they had");
    assert_eq!(view.members[0].state, MemberState::Loading, "and what could not be written meanwhile");
    let late = join(&etcd, "emptied").await;
    assert_eq!(ids(&late.watch().borrow()), ["a", "b"], "the records are really there");
}

#[tokio::test]
async fn an_etcd_that_hangs_and_returns_changes_nothing() {
    let Some(etcd) = Etcd::start_or_skip("an_etcd_that_hangs_and_returns_changes_nothing") else { return };
    let (one, two) = (join(&etcd, "hangs").await, join(&etcd, "hangs").await);
    let a = one.register(always(expert("a", &[0]))).await.expect("free");
    until(&two, "a", |view| ids(view) == ["a"]).await;
    etcd.pause().expect("it runs");
    let away = until(&two, "etcd hangs", |view| !view.reachable).await;
    assert_eq!(ids(&away), ["a"]);
    etcd.resume().expect("it is stopped");
    until(&two, "etcd answers", |view| view.reachable && ids(view) == ["a"]).await;
    a.leave().await.expect("etcd is up");
    until(&two, "a has left", |view| view.members.is_empty()).await;
}
