//! From one host to another: over gRPC, and links of devices for what batches and answers are about.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use conclave_cluster::{Member, SameHost};
use conclave_dispatch::pair::{NoPair, Pairs, Way};
use conclave_dispatch::{LinkError, RemoteShards, ShardConnector, Transport};
use conclave_expert::ExpertConfig;
use conclave_kernels::Dtype;
use conclave_proto::v1::{ExpertBatch, WorkErrorKind};
use conclave_serve::same_host::{self, SameHost::Auto};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::rig::{Caller, LIMIT, ROWS, Shard, gpu, lose_within_a_batch, pair_device, until};
use crate::support::{ALL, batch, checkpoint, member, reference, start};

/// Longer than a transfer may take.
const PATIENCE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn any_placement_over_links_has_the_bits_of_messages() {
    let (_dir, checkpoint) = checkpoint();
    let placements: [&[&[u32]]; 3] = [&[&ALL], &[&[0, 1, 5], &[2, 3, 4, 6, 7]], &[&[0, 2, 4, 6], &[1, 3, 5], &[7]]];
    let mut runner = TestRunner::deterministic();
    for placement in placements {
        let start = |(at, groups): (usize, &&[u32])| Shard::start(&format!("s{at}"), &checkpoint, groups);
        let shards: Vec<Shard> = placement.iter().enumerate().map(start).collect();
        let caller = Caller::far(&checkpoint, &shards.iter().collect::<Vec<_>>(), 1024).await;
        caller.by_pairs().await;
        let before = caller.batches();
        for _ in 0..5 {
            let (seed, rows) = (0u64..1000, 1..=ROWS).new_tree(&mut runner).unwrap().current();
            caller.check(seed, rows).await;
        }
        let after = caller.batches();
        assert!(after.0 >= before.0 + 5 && after.1 == before.1, "{before:?}, then {after:?}");
        caller.check(2000, ROWS + 1).await;
        assert!(caller.batches().1 > after.1, "more rows than the board has");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_one_host_have_links_over_their_socket_too() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::by(Way::Nccl, &checkpoint, vec![shard.record(checkpoint.fingerprint())], 1024).await;
    caller.by_pairs().await;
    caller.check(1, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_messages_at_once_than_one_go_past_a_busy_pair() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::far(&checkpoint, &[&shard], 3).await;
    while caller.batches().0 == 0 {
        caller.check(1, 3).await;
    }
    let (by_pair, in_messages) = caller.batches();
    caller.check(1, ROWS).await;
    assert_eq!(caller.batches(), (by_pair + 1, in_messages + 3));
    caller.check(2, 3).await;
    assert_eq!(caller.batches(), (by_pair + 2, in_messages + 3), "it is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_lost_within_a_batch_takes_no_other_link_along() {
    let (_dir, checkpoint) = checkpoint();
    let mut shards = ["a", "b"].map(|name| Shard::start(name, &checkpoint, &ALL[..4]));
    let other = Shard::start("c", &checkpoint, &ALL[4..]);
    let caller = Caller::far(&checkpoint, &[&shards[0], &shards[1], &other], 1024).await;
    caller.by_pairs().await;
    caller.check(1, 6).await;
    let (found, ()) = tokio::join!(caller.layer(2, 6), lose_within_a_batch(&mut shards));
    assert_eq!(found, caller.expected(2, 6).await);
    caller.by_pairs().await;
}

/// A transfer that does not go on costs its own patience, and is made good in messages over the same stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_stands_still_ends_the_link_and_the_batch_goes_in_a_message() {
    let (_dir, checkpoint) = checkpoint();
    for of_shard in [true, false] {
        let shard = Shard::start("a", &checkpoint, &ALL);
        let caller = Caller::far(&checkpoint, &[&shard], 1024).await;
        caller.by_pairs().await;
        let (by_pair, in_messages) = caller.batches();
        let gate = if of_shard { &shard.gate } else { &caller.gate };
        gate.stands_still.store(true, Ordering::SeqCst);
        let begun = Instant::now();
        caller.check(1, 6).await;
        assert!(gate.stood.load(Ordering::SeqCst) > 0 && begun.elapsed() < 4 * PATIENCE, "{:?}", begun.elapsed());
        assert_eq!(caller.batches(), (by_pair + 1, in_messages + 1));
        gate.stands_still.store(false, Ordering::SeqCst);
        for seed in 2..5 {
            caller.check(seed, 6).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_that_do_not_come_are_asked_for_in_messages() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::far(&checkpoint, &[&shard], 1024).await;
    caller.by_pairs().await;
    let (by_pair, in_messages) = caller.batches();
    shard.gate.shut();
    let (found, ()) = tokio::join!(caller.layer(1, 6), async {
        until("the rows are there", || shard.gate.held.load(Ordering::SeqCst) > 0).await;
        shard.gate.stands_still.store(true, Ordering::SeqCst);
        shard.gate.open();
    });
    assert_eq!(found, caller.expected(1, 6).await);
    assert_eq!(caller.batches(), (by_pair + 1, in_messages + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_given_up_keeps_its_turn_until_its_sums_have_come() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::far(&checkpoint, &[&shard], 1024).await;
    caller.by_pairs().await;
    let (by_pair, in_messages) = caller.batches();
    shard.gate.shut();
    let given_up = timeout(Duration::from_millis(300), caller.layer(2, 4)).await;
    assert!(given_up.is_err() && shard.gate.held.load(Ordering::SeqCst) > 0);
    let (found, ()) = tokio::join!(caller.layer(3, 4), async {
        until("the next batch waits", || shard.service.status().queued_rows > 0).await;
        shard.gate.open();
    });
    assert_eq!(found, caller.expected(3, 4).await);
    assert_eq!(caller.batches(), (by_pair + 1, in_messages + 1), "the shard was still at the one before");
    caller.by_pairs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_given_up_while_it_waits_gives_its_turn_back() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let (ahead, caller) =
        (Caller::far(&checkpoint, &[&shard], 99).await, Caller::far(&checkpoint, &[&shard], 99).await);
    ahead.by_pairs().await;
    caller.by_pairs().await;
    shard.gate.shut();
    let (found, ()) = tokio::join!(ahead.layer(2, 4), async {
        until("the first one is computed", || shard.gate.held.load(Ordering::SeqCst) > 0).await;
        let given_up = timeout(Duration::from_millis(300), caller.layer(3, 4)).await;
        assert!(given_up.is_err() && shard.service.status().queued_rows > 0);
        shard.gate.open();
    });
    assert_eq!(found, ahead.expected(2, 4).await);
    // It was answered, although nobody waits for its sums.
    caller.by_pairs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_refused_leaves_the_link_as_it_was() {
    let (_dir, checkpoint) = checkpoint();
    let config = ExpertConfig { sign_every: LIMIT, queue_rows: 12, ..ExpertConfig::new("a") };
    let shard = Shard::with(config, &checkpoint, &ALL);
    let fingerprint = checkpoint.fingerprint();
    let caller = Caller::far(&checkpoint, &[&shard], 1024).await;
    caller.by_pairs().await;
    let link = RemoteShards::new(fingerprint, LIMIT, None).connect(&shard.far(fingerprint)).await.unwrap();
    shard.gate.shut();
    let fill = |step| {
        let link = link.clone();
        tokio::spawn(async move { link.compute(batch(Dtype::Bf16, step, 8, 0)).await })
    };
    let running = fill(100);
    until("one runs", || shard.gate.held.load(Ordering::SeqCst) > 0).await;
    let waiting = fill(101);
    until("one waits", || shard.service.status().queued_rows == 8).await;
    let refused = |retries: &str| retries.contains("conclave_dispatch_retries_total{reason=\"busy\"}");
    let (found, ()) = tokio::join!(caller.layer(1, ROWS), async {
        until("it is refused", || refused(&conclave_serve::metrics::render(&caller.registry))).await;
        shard.gate.open();
    });
    assert_eq!(found, caller.expected(1, ROWS).await);
    assert!(running.await.unwrap().unwrap().error.is_none() && waiting.await.unwrap().unwrap().error.is_none());
    let before = caller.batches();
    caller.check(2, ROWS).await;
    assert_eq!(caller.batches(), (before.0 + 1, before.1), "the rows of the refused one were received");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_without_a_pair_says_why_and_is_none_where_one_is_asked_for() {
    let (_dir, checkpoint) = checkpoint();
    let fingerprint = checkpoint.fingerprint();
    let (device, _) = gpu(5);
    let offered = pair_device(Way::Nccl, &device);
    let link = async |shard: &Member, pairs: Pairs| {
        RemoteShards::new(fingerprint, LIMIT, Auto.host()).with_pairs(pairs).connect(shard).await
    };
    let open = Shard::start("a", &checkpoint, &ALL);
    let silent = Shard::with(ExpertConfig { pairs: Vec::new(), ..ExpertConfig::new("b") }, &checkpoint, &ALL);
    let near = Shard::with(ExpertConfig { pairs: vec![Way::Ipc], ..ExpertConfig::new("c") }, &checkpoint, &ALL);
    for (shard, expected) in [
        (&silent, "the shard: nothing but messages is asked for here"),
        (&near, "the shard: payload nccl is not asked for here"),
    ] {
        let record = shard.far(fingerprint);
        let without = link(&record, Pairs::Offered(offered.clone())).await.unwrap();
        assert_eq!(without.pair().err().unwrap().to_string(), expected);
        assert!(without.compute(batch(Dtype::Bf16, 1, 2, 0)).await.unwrap().error.is_none(), "messages go");
        let mut board = ExpertBatch { board_rows: vec![0, 1], ..batch(Dtype::Bf16, 2, 2, 0) };
        board.x.clear();
        let error = without.compute(board).await.unwrap().error.expect("refused");
        assert_eq!(error.kind(), WorkErrorKind::Invalid);
        assert!(error.message.contains("there is no pair with this caller"), "{}", error.message);
        let error = link(&record, Pairs::Required(offered.clone())).await.err().expect("refused").to_string();
        assert!(error.ends_with(&format!("payload nccl is asked for: {expected}")), "{error}");
    }
    let with = link(&open.far(fingerprint), Pairs::Required(offered.clone())).await.unwrap();
    assert!(with.pair().is_ok() && with.transport() == Transport::Tcp);
    let board: Pairs = Pairs::Offered(pair_device(Way::Ipc, &gpu(6).0));
    let far = link(&open.far(fingerprint), board).await.unwrap();
    assert_eq!(far.pair().err(), Some(NoPair::Far), "memory is not shared from host to host");
    let on_host = start(ExpertConfig::new("d"), reference(), &checkpoint, &ALL);
    let (listener, socket) = same_host::listen("d").unwrap();
    tokio::spawn(on_host.serve_streams(listener, CancellationToken::new()));
    let same_host = Some(SameHost { host: Auto.host().unwrap(), socket });
    let record = Member { same_host, ..member("d", "http://127.0.0.1:1", &ALL, fingerprint) };
    let why = link(&record, Pairs::Offered(offered.clone())).await.unwrap().pair().err().unwrap().to_string();
    assert!(why.starts_with("the shard: device reference-1: has no links to devices of other processes"), "{why}");
    let nobody = Member { address: "http://127.0.0.1:1".into(), ..open.far(fingerprint) };
    let error = link(&nobody, Pairs::Required(offered)).await.err().expect("nobody");
    assert!(matches!(error, LinkError::Lost { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_was_refused_is_offered_again_and_one_that_was_used_is_not() {
    let (device, _) = gpu(5);
    let offering = pair_device(Way::Nccl, &device);
    let first = offering.offer().unwrap();
    let second = offering.offer().unwrap();
    assert_ne!(first, second);
    offering.take_back(first.clone());
    assert_eq!(offering.offer().unwrap(), first);
    let third = offering.offer().unwrap();
    assert!(third != first && third != second);
    assert!(Arc::strong_count(&device) > 1);
}
