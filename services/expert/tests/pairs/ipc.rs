//! Between processes of one host: each side reads the other's memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use conclave_cluster::{Member, MemberState, SameHost};
use conclave_dispatch::pair::{BoardDevice, NoPair, PairDevice, PairMemory, Pairs, Way};
use conclave_dispatch::{LinkError, RemoteShards, ShardConnector, Transport};
use conclave_expert::ExpertConfig;
use conclave_kernels::{Dtype, KernelError};
use conclave_proto::v1::{ExpertBatch, PairGrant, PairOffer, WorkErrorKind};
use conclave_serve::same_host::{self, SameHost::Auto};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::rig::{Caller, LIMIT, ROWS, Shard, gpu, lose_within_a_batch, until};
use crate::support::{ALL, HIDDEN, batch, checkpoint, member, reference, start};

#[tokio::test(flavor = "multi_thread")]
async fn any_placement_by_pairs_has_the_bits_of_messages() {
    let (_dir, checkpoint) = checkpoint();
    let placements: [&[&[u32]]; 3] = [&[&ALL], &[&[0, 1, 5], &[2, 3, 4, 6, 7]], &[&[0, 2, 4, 6], &[1, 3, 5], &[7]]];
    let mut runner = TestRunner::deterministic();
    for placement in placements {
        let start = |(at, groups): (usize, &&[u32])| Shard::start(&format!("s{at}"), &checkpoint, groups);
        let shards: Vec<Shard> = placement.iter().enumerate().map(start).collect();
        let caller = Caller::start(&checkpoint, &shards.iter().collect::<Vec<_>>(), 1024).await;
        for _ in 0..3 {
            let (seed, rows) = (0u64..1000, 1..=ROWS).new_tree(&mut runner).unwrap().current();
            caller.check(seed, rows).await;
        }
        let (by_pair, in_messages) = caller.batches();
        assert!(by_pair >= 3 && in_messages == 0, "{by_pair} by pairs, {in_messages} in messages");
        caller.check(2000, ROWS + 1).await;
        assert!(caller.batches().1 > 0, "more rows than the board has");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_messages_at_once_than_one_go_past_a_busy_pair() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::start(&checkpoint, &[&shard], 3).await;
    caller.check(1, ROWS).await;
    assert_eq!(caller.batches(), (1, 3));
    caller.check(2, 3).await;
    assert_eq!(caller.batches(), (2, 3), "it is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_lost_within_a_batch_loses_nothing() {
    let (_dir, checkpoint) = checkpoint();
    let mut shards = ["a", "b"].map(|name| Shard::start(name, &checkpoint, &ALL[..4]));
    let other = Shard::start("c", &checkpoint, &ALL[4..]);
    let caller = Caller::start(&checkpoint, &[&shards[0], &shards[1], &other], 1024).await;
    caller.check(1, 6).await;
    let (found, ()) = tokio::join!(caller.layer(2, 6), lose_within_a_batch(&mut shards));
    assert_eq!(found, caller.expected(2, 6).await);
    let before = caller.batches().0;
    caller.check(3, 6).await;
    assert_eq!(caller.batches().0, before + 2, "the pairs with the others are as they were");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_whose_device_fails_leaves_and_no_layer_is_lost() {
    let (_dir, checkpoint) = checkpoint();
    let shards = ["a", "b"].map(|name| Shard::start(name, &checkpoint, &ALL));
    let caller = Caller::start(&checkpoint, &[&shards[0], &shards[1]], 1024).await;
    caller.check(1, 6).await;
    // The one that was used.
    let (broken, other) = if shards[0].computed() > 0 { (&shards[0], &shards[1]) } else { (&shards[1], &shards[0]) };
    broken.gate.breaks.store(true, Ordering::SeqCst);
    let before = broken.computed();
    for seed in 2..5 {
        caller.check(seed, 6).await;
    }
    assert_eq!(broken.computed(), before, "what it answered after that");
    assert!(other.computed() > 0);
    assert_eq!(*broken.service.state().borrow(), MemberState::Leaving);
    assert_eq!(*other.service.state().borrow(), MemberState::Ready);
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_that_cannot_be_read_come_in_messages_over_the_same_link() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::start(&checkpoint, &[&shard], 1024).await;
    caller.check(1, 4).await;
    caller.gate.fails.store(true, Ordering::SeqCst);
    caller.check(2, 4).await;
    assert_eq!(caller.batches(), (2, 1));
    caller.gate.fails.store(false, Ordering::SeqCst);
    caller.check(3, 4).await;
    assert_eq!(caller.batches(), (2, 2), "the pair is closed for good");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_wakes_up_late_changes_nothing_and_its_pair_serves_again() {
    let (_dir, checkpoint) = checkpoint();
    let shards = ["a", "b"].map(|name| Shard::start(name, &checkpoint, &ALL));
    let caller = Caller::start(&checkpoint, &[&shards[0], &shards[1]], 1024).await;
    // Until it is known how long it takes.
    for seed in 0..9 {
        caller.check(seed, 2).await;
    }
    // Whoever is asked first stands still.
    shards.iter().for_each(|shard| shard.gate.shut());
    let held = |shard: &Shard| shard.gate.held.load(Ordering::SeqCst) > 0;
    let (found, first) = tokio::join!(timeout(LIMIT, caller.layer(20, 5)), async {
        until("one is asked", || shards.iter().any(held)).await;
        let first = usize::from(!held(&shards[0]));
        shards[1 - first].gate.open();
        first
    });
    assert_eq!(found.expect("an answer of the other one"), caller.expected(20, 5).await);
    let (used, spare) = (&shards[first], &shards[1 - first]);
    let before = used.computed();
    // Other rows are on the board by now, and the sums of others are being read.
    caller.check(21, 7).await;
    used.gate.open();
    until("the late work is done", || used.computed() > before).await;
    caller.check(22, 3).await;
    // From now on it is all there is.
    spare.service.drain().await;
    let mut by_pair = caller.batches().0;
    let mut again = false;
    for seed in 30..60 {
        let before = used.computed();
        caller.check(seed, 4).await;
        again |= used.computed() > before && caller.batches().0 > by_pair;
        by_pair = caller.batches().0;
    }
    assert!(again, "the pair of the shard that woke up serves again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_by_pair_that_is_given_up_keeps_its_turn_until_its_answer() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let caller = Caller::start(&checkpoint, &[&shard], 1024).await;
    caller.check(1, 4).await;
    shard.gate.shut();
    let given_up = timeout(Duration::from_millis(300), caller.layer(2, 4)).await;
    assert!(given_up.is_err() && shard.gate.held.load(Ordering::SeqCst) > 0);
    // Long enough for a turn that would end too early.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (found, ()) = tokio::join!(caller.layer(3, 4), async {
        until("the next batch waits", || shard.service.status().queued_rows > 0).await;
        shard.gate.open();
    });
    assert_eq!(found, caller.expected(3, 4).await);
    assert_eq!(caller.batches(), (2, 1), "the shard was still at the one before");
    caller.check(4, 4).await;
    assert_eq!(caller.batches(), (3, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_by_pair_that_is_given_up_while_it_waits_gives_its_turn_back() {
    let (_dir, checkpoint) = checkpoint();
    let shard = Shard::start("a", &checkpoint, &ALL);
    let (ahead, caller) =
        (Caller::start(&checkpoint, &[&shard], 9).await, Caller::start(&checkpoint, &[&shard], 9).await);
    caller.check(1, 4).await;
    shard.gate.shut();
    let (found, ()) = tokio::join!(ahead.layer(2, 4), async {
        until("the first one is computed", || shard.gate.held.load(Ordering::SeqCst) > 0).await;
        let given_up = timeout(Duration::from_millis(300), caller.layer(3, 4)).await;
        assert!(given_up.is_err() && shard.service.status().queued_rows > 0);
        shard.gate.open();
    });
    assert_eq!(found, ahead.expected(2, 4).await);
    let before = caller.batches().0;
    for seed in 4..40 {
        caller.check(seed, 4).await;
    }
    assert!(caller.batches().0 > before, "it was answered, although nobody waits for its sums");
}

/// An offer of something.
struct Offers(PairOffer);

impl PairDevice for Offers {
    fn way(&self) -> Way {
        Way::of(&self.0)
    }

    fn offer(&self) -> Result<PairOffer, KernelError> {
        Ok(self.0.clone())
    }

    fn open(&self, _: &PairOffer, _: &PairGrant) -> Result<Box<dyn PairMemory>, KernelError> {
        Err(KernelError::Failed("no way to it".to_owned()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_without_a_pair_says_why_and_is_none_where_one_is_asked_for() {
    let (_dir, checkpoint) = checkpoint();
    let fingerprint = checkpoint.fingerprint();
    let (device, _) = gpu(5);
    let offered: Arc<dyn PairDevice> = Arc::new(BoardDevice::new(device, ROWS, HIDDEN).unwrap());
    let right = offered.offer().unwrap();
    let offers = |offer: PairOffer| Arc::new(Offers(offer)) as Arc<dyn PairDevice>;
    let link = async |shard: &Member, pairs: Pairs| {
        RemoteShards::new(fingerprint, LIMIT, Auto.host()).with_pairs(pairs).connect(shard).await
    };
    let sharing = Shard::start("a", &checkpoint, &ALL);
    let silent = Shard::with(ExpertConfig { pairs: Vec::new(), ..ExpertConfig::new("b") }, &checkpoint, &ALL);
    let large = PairOffer { board_bytes: 1 << 40, ..right.clone() };
    let nonsense = PairOffer { board: vec![1; 9].into(), ..right.clone() };
    let lying = PairOffer { board_bytes: right.board_bytes + 1, ..right.clone() };
    for (shard, device, expected) in [
        (&silent, offered.clone(), "the shard: nothing but messages is asked for here"),
        (&sharing, offers(large), "the shard: board: found 1099511627776 bytes, expected 1 to 268435456"),
        (&sharing, offers(nonsense), "the shard: open shared memory: found a handle of 9 bytes, expected shim:PATH"),
        (&sharing, offers(lying), "the shard: use shared memory: asked for 769 bytes, there are 768"),
        (&sharing, offers(right), "the shard: the device has failed: no way to it"),
    ] {
        let record = shard.record(fingerprint);
        let without = link(&record, Pairs::Offered(device.clone())).await.unwrap();
        assert_eq!(without.pair().err().unwrap().to_string(), expected);
        assert!(without.compute(batch(Dtype::Bf16, 1, 2, 0)).await.unwrap().error.is_none(), "messages go");
        let mut board = ExpertBatch { board_rows: vec![0, 1], ..batch(Dtype::Bf16, 2, 2, 0) };
        board.x.clear();
        let error = without.compute(board).await.unwrap().error;
        if !expected.ends_with("no way to it") {
            let error = error.expect("refused");
            assert_eq!(error.kind(), WorkErrorKind::Invalid);
            assert!(error.message.contains("there is no pair with this caller"), "{}", error.message);
        }
        let error = link(&record, Pairs::Required(device)).await.err().expect("refused");
        assert!(matches!(error, LinkError::Refused { .. } | LinkError::Lost { .. }), "{error}");
    }
    let record = sharing.record(fingerprint);
    let with = link(&record, Pairs::Required(offered.clone())).await.unwrap();
    assert!(with.pair().is_ok() && with.transport() == Transport::SameHost);
    let unasked = link(&record, Pairs::Without(NoPair::Unasked)).await.unwrap();
    assert_eq!(unasked.pair().err(), Some(NoPair::Unasked));

    let on_host = start(ExpertConfig::new("d"), reference(), &checkpoint, &ALL);
    let (listener, socket) = same_host::listen("d").unwrap();
    tokio::spawn(on_host.serve_streams(listener, CancellationToken::new()));
    let same_host = Some(SameHost { host: Auto.host().unwrap(), socket });
    let record = Member { same_host, ..member("d", "http://127.0.0.1:1", &ALL, fingerprint) };
    let why = link(&record, Pairs::Offered(offered)).await.unwrap().pair().err().unwrap();
    assert!(why.to_string().contains("device reference-1: shares no memory with other processes"), "{why}");
}
