//! One layer outlives shards that fail, refuse, hang or answer wrongly. Time is the runtime's paused clock.

mod support;

use std::time::Duration;

use conclave_dispatch::{DispatchConfig, MoeError};
use conclave_proto::v1::{MoeInput, WorkErrorKind};
use support::{ALL, Cluster, Mood, expected, input};
use tokio::time::{Instant, sleep};

async fn two_replicas() -> Cluster {
    Cluster::new(DispatchConfig::new("f"), &[("a", &ALL), ("b", &ALL)]).await
}

/// A call whose first choice is `a`, with `a` in `mood`: it has to end right, on `b`.
async fn survives(mood: Mood) -> Cluster {
    let cluster = two_replicas().await;
    cluster.shard("a").set(mood);
    let input = input(1, 1);
    let output = cluster.dispatcher.call(input.clone()).await.unwrap();
    assert_eq!(output.routed, expected(&input).await.routed);
    assert_eq!(cluster.shard("b").calls(), 1);
    cluster
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_is_replaced_and_the_shard_set_aside_until_it_is_back() {
    let cluster = survives(Mood::Breaks).await;
    assert_eq!(cluster.health("a"), "set-aside");
    assert_eq!(cluster.health("b"), "ok");
    assert_eq!(cluster.health("c"), "unknown");
    cluster.dispatcher.call(input(2, 1)).await.unwrap();
    assert_eq!(cluster.shard("a").calls(), 1, "no more work while set aside");
    cluster.shard("a").set(Mood::Well);
    sleep(Duration::from_secs(1)).await;
    cluster.shard("b").set(Mood::Gone);
    cluster.dispatcher.call(input(3, 3)).await.unwrap();
    assert_eq!(cluster.health("a"), "ok");
}

#[tokio::test(start_paused = true)]
async fn a_refused_connection_an_overload_and_a_wrong_answer_go_elsewhere() {
    survives(Mood::Gone).await;
    survives(Mood::Refuses(WorkErrorKind::Overloaded)).await;
    survives(Mood::Refuses(WorkErrorKind::Leaving)).await;
    survives(Mood::Refuses(WorkErrorKind::NotHeld)).await;
    survives(Mood::Refuses(WorkErrorKind::Internal)).await;
    survives(Mood::Refuses(WorkErrorKind::Invalid)).await;
    let cluster = survives(Mood::Short).await;
    assert_eq!(cluster.health("a"), "set-aside");
    assert_eq!(cluster.metric("conclave_dispatch_retries_total"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn attempts_have_different_ids() {
    let cluster = survives(Mood::Breaks).await;
    let (a, b) = (cluster.shard("a"), cluster.shard("b"));
    let (a, b) = (a.seen.lock().unwrap()[0].id.unwrap(), b.seen.lock().unwrap()[0].id.unwrap());
    assert_eq!((a.caller, a.step, a.layer), (b.caller, b.step, b.layer));
    assert!(b.attempt > a.attempt);
}

#[tokio::test(start_paused = true)]
async fn a_hanging_shard_costs_a_bounded_time() {
    let started = Instant::now();
    let cluster = survives(Mood::Hangs).await;
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    assert_eq!(cluster.health("a"), "set-aside");
}

#[tokio::test(start_paused = true)]
async fn once_the_speed_is_known_a_hang_is_noticed_sooner() {
    let cluster = two_replicas().await;
    cluster.shard("a").set(Mood::Slow(Duration::from_millis(2)));
    for step in 0..20 {
        cluster.dispatcher.call(MoeInput { step, ..input(100, 1) }).await.unwrap();
    }
    assert_eq!(cluster.shard("b").calls(), 0, "the replica of the last time is kept");
    cluster.shard("a").set(Mood::Hangs);
    let started = Instant::now();
    cluster.dispatcher.call(input(100, 1)).await.unwrap();
    assert!(started.elapsed() <= Duration::from_millis(1100), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_is_at_other_work_and_says_so_does_not_hang() {
    let cluster = two_replicas().await;
    let mut retries = Vec::new();
    for mood in [Mood::Slow(Duration::from_secs(4)), Mood::Queued(Duration::from_secs(4))] {
        cluster.shard("b").set(Mood::Gone);
        cluster.shard("a").set(Mood::Slow(Duration::from_millis(2)));
        for step in 0..10 {
            cluster.dispatcher.call(MoeInput { step, ..input(100, 1) }).await.unwrap();
        }
        cluster.shard("a").set(mood);
        let started = Instant::now();
        cluster.dispatcher.call(input(100, 1)).await.unwrap();
        assert_eq!(started.elapsed().as_secs(), 4, "its answer is waited for");
        retries.push(cluster.metric("conclave_dispatch_retries_total"));
    }
    assert!(retries[0] >= 1.0 && retries[1] == retries[0], "{retries:?}: silent, then with signs of life");
}

#[tokio::test(start_paused = true)]
async fn slow_calls_are_hedged_but_only_two_in_a_hundred() {
    let cluster = two_replicas().await;
    let (quick, slow) = (Mood::Slow(Duration::from_millis(1)), Mood::Slow(Duration::from_millis(900)));
    let mut shortened = 0;
    for step in 0..500 {
        // Mostly quick, so that the prediction stays low; now and then one of the two is far slower.
        let disturbed = [(4, "a"), (9, "b")].into_iter().find(|(turn, _)| step % 10 == *turn).map(|(_, name)| name);
        for name in ["a", "b"] {
            cluster.shard(name).set(if disturbed == Some(name) { slow } else { quick });
        }
        let started = Instant::now();
        let input = MoeInput { step, ..input(100, 1) };
        let output = cluster.dispatcher.call(input.clone()).await.unwrap();
        if step % 50 == 0 {
            assert_eq!(output.routed, expected(&input).await.routed);
        }
        if disturbed.is_some() && (30..900).contains(&started.elapsed().as_millis()) {
            shortened += 1;
        }
    }
    let counted = cluster.metric("conclave_dispatch_hedges_total");
    let messages = cluster.shard("a").calls() + cluster.shard("b").calls();
    assert!(counted >= 1.0 && counted <= 0.02 * messages as f64, "{counted} hedges of {messages} messages");
    assert!(shortened >= 1, "a hedge shortens a call");
}

#[tokio::test(start_paused = true)]
async fn a_cell_without_replica_is_named_after_a_bounded_wait() {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[("a", &ALL[..7])]).await;
    let started = Instant::now();
    let error = cluster.dispatcher.call(input(1, 30)).await.unwrap_err();
    assert!(matches!(error, MoeError::NoReplica { cell, .. } if cell.group.0 == 7), "{error}");
    assert!(error.to_string().starts_with("cell 7: no live replica within 30"), "{error}");
    assert!(started.elapsed() >= Duration::from_secs(30) && started.elapsed() < Duration::from_secs(32));
}

#[tokio::test(start_paused = true)]
async fn a_budget_ends_the_wait_for_a_replica_and_still_names_the_cell() {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[]).await;
    let mut input = input(1, 30);
    input.budget_us = 500_000;
    let started = Instant::now();
    let error = cluster.dispatcher.call(input).await.unwrap_err();
    assert!(matches!(error, MoeError::NoReplica { waited_ms: 500, .. }), "{error}");
    assert_eq!(started.elapsed().as_millis(), 500);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_appears_is_used_at_once() {
    let mut cluster = Cluster::new(DispatchConfig::new("f"), &[("a", &ALL[..4])]).await;
    let input = input(1, 30);
    let call = {
        let (dispatcher, input) = (cluster.dispatcher.clone(), input.clone());
        tokio::spawn(async move { dispatcher.call(input).await })
    };
    sleep(Duration::from_secs(9)).await;
    cluster.join("b", &ALL[4..]).await;
    let output = call.await.unwrap().unwrap();
    assert_eq!(output.routed, expected(&input).await.routed);
    assert!(cluster.metric("conclave_dispatch_no_replica_waits_total") > 0.0);
}

#[tokio::test(start_paused = true)]
async fn the_only_replica_is_tried_again_until_it_works() {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[("a", &ALL)]).await;
    let shard = cluster.shard("a");
    shard.set(Mood::Gone);
    let call = {
        let dispatcher = cluster.dispatcher.clone();
        tokio::spawn(async move { dispatcher.call(input(1, 3)).await })
    };
    sleep(Duration::from_secs(7)).await;
    shard.set(Mood::Well);
    assert_eq!(call.await.unwrap().unwrap().routed, expected(&input(1, 3)).await.routed);
}

#[tokio::test(start_paused = true)]
async fn a_hang_without_replica_ends_with_the_budget() {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[("a", &ALL)]).await;
    cluster.shard("a").set(Mood::Hangs);
    let mut input = input(1, 3);
    input.budget_us = 3_000_000;
    let started = Instant::now();
    let error = cluster.dispatcher.call(input).await.unwrap_err();
    assert_eq!(error, MoeError::Expired { layer: 1, budget_ms: 3000 });
    assert_eq!(started.elapsed().as_secs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_failed_shard_of_many_cells_is_replaced_by_several() {
    let cluster =
        Cluster::new(DispatchConfig::new("f"), &[("a", &ALL), ("b", &[0, 1, 2]), ("c", &[3, 4]), ("d", &[5, 6, 7])])
            .await;
    for name in ["b", "c", "d"] {
        cluster.shard(name).set(Mood::Slow(Duration::from_millis(1)));
    }
    let input = input(1, 40);
    cluster.shard("a").set(Mood::Breaks);
    let output = cluster.dispatcher.call(input.clone()).await.unwrap();
    assert_eq!(output.routed, expected(&input).await.routed);
    assert_eq!(output.shards, 3);
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_leaves_gets_nothing_more() {
    let mut cluster = two_replicas().await;
    cluster.dispatcher.call(input(1, 1)).await.unwrap();
    assert_eq!((cluster.shard("a").calls(), cluster.shard("b").calls()), (1, 0));
    cluster.leave("a").await;
    cluster.dispatcher.call(input(2, 1)).await.unwrap();
    assert_eq!((cluster.shard("a").calls(), cluster.shard("b").calls()), (1, 1));
}

type Spoil = Box<dyn Fn(&mut MoeInput)>;

#[tokio::test]
async fn malformed_input_is_refused_by_name() {
    let cluster = two_replicas().await;
    let cases: Vec<(&str, Spoil)> = vec![
        ("layer: found 0, expected one with routed experts", Box::new(|i| i.layer = 0)),
        ("layer: found 77, expected one with routed experts", Box::new(|i| i.layer = 77)),
        ("activation: found 0, expected 1 (f32) or 2 (bf16)", Box::new(|i| i.activation = 0)),
        ("rows: found 0, expected 1 to 16384", Box::new(|i| i.rows = 0)),
        ("rows: found 4000000, expected 1 to 16384", Box::new(|i| i.rows = 4_000_000)),
        ("hidden: found 17, expected 16", Box::new(|i| i.hidden = 17)),
        ("experts: found 31, expected 32", Box::new(|i| i.experts = 31)),
        ("x: found 64 bytes, expected 96", Box::new(|i| i.x = i.x.slice(..64))),
        ("logits: found 4 bytes, expected 384", Box::new(|i| i.logits = i.logits.slice(..4))),
        (
            "gate logits: found NaN at row 0, expert 0, expected a finite number",
            Box::new(|i| i.logits = vec![0xff; 384].into()),
        ),
    ];
    for (message, spoil) in cases {
        let mut input = input(1, 3);
        spoil(&mut input);
        let error = cluster.dispatcher.call(input).await.unwrap_err();
        assert_eq!(error, MoeError::Invalid(message.to_owned()));
    }
    assert_eq!(cluster.shard("a").calls(), 0);
}
