//! Placement, splitting and replicas change no bit, and a row reaches few shards.

mod support;

use conclave_dispatch::{DispatchConfig, gate};
use conclave_kernels::{Dtype, activation};
use proptest::prelude::*;
use support::{ALL, Cluster, EXPERTS, GROUPS, HIDDEN, SIZE, expected, input, shape, values};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[tokio::test]
async fn the_sum_is_what_the_definition_says() {
    let rows = 5;
    let input = input(1, rows);
    let output = expected(&input).await;
    let mut logits = Vec::new();
    activation::decode(Dtype::F32, &input.logits, &mut logits);
    let choices = gate::select(&shape().gate, &[], &logits, rows).unwrap();
    let (mut x, mut routed) = (Vec::new(), Vec::new());
    activation::decode(Dtype::Bf16, &input.x, &mut x);
    activation::decode(Dtype::Bf16, &output.routed, &mut routed);
    assert_eq!(routed.len(), rows * HIDDEN);
    for row in 0..rows {
        let (experts, weights) = choices.row(row);
        let factor: f32 = experts.iter().zip(weights).map(|(e, w)| (e + 1) as f32 * w).sum();
        for (routed, x) in routed[row * HIDDEN..][..HIDDEN].iter().zip(&x[row * HIDDEN..]) {
            assert!((routed - factor * x).abs() <= 0.02 * (factor * x).abs() + 1e-3, "{routed} for {}", factor * x);
        }
    }
}

#[tokio::test]
async fn a_row_reaches_at_most_topk_group_shards() {
    let shards: Vec<(String, [u32; 1])> = ALL.iter().map(|g| (format!("s{g}"), [*g])).collect();
    let shards: Vec<(&str, &[u32])> = shards.iter().map(|(name, groups)| (name.as_str(), &groups[..])).collect();
    let cluster = Cluster::new(DispatchConfig::new("f"), &shards).await;
    for seed in 0..40 {
        let output = cluster.dispatcher.call(input(seed, 1)).await.unwrap();
        assert!((1..=3).contains(&output.shards), "one row went to {} shards", output.shards);
    }
    cluster.dispatcher.call(input(99, 64)).await.unwrap();
    assert!(cluster.metric("conclave_dispatch_groups_per_row_max") <= 3.0);
    assert_eq!(cluster.metric("conclave_dispatch_groups_per_row"), 104.0);
    let pairs: u64 = cluster.dispatcher.cell_rows().iter().map(|(_, rows)| rows).sum();
    assert_eq!(pairs, 104 * 6, "each row has six experts, each counted once");
}

#[tokio::test]
async fn a_shard_with_neighbouring_cells_sends_one_sum_a_row() {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[("a", &[0, 1, 2, 3]), ("b", &[4, 5, 6, 7])]).await;
    for seed in 0..10 {
        cluster.dispatcher.call(input(seed, 1)).await.unwrap();
    }
    for name in ["a", "b"] {
        for batch in cluster.shard(name).seen.lock().unwrap().iter() {
            assert_eq!(batch.groups.len(), 4, "idle groups are named too, so that the subtree is whole");
        }
    }
}

#[tokio::test]
async fn only_the_rows_needed_travel() {
    let cluster = Cluster::new(DispatchConfig::new("f"), &[("a", &[0]), ("b", &ALL[1..])]).await;
    let input = input(3, 40);
    cluster.dispatcher.call(input.clone()).await.unwrap();
    let shard = cluster.shard("a");
    let seen = shard.seen.lock().unwrap();
    let batch = &seen[0];
    assert!(batch.rows > 0 && batch.rows < 40);
    assert_eq!(batch.x.len(), batch.rows as usize * HIDDEN * 2);
    assert!(batch.experts.iter().all(|e| *e < SIZE));
}

#[test]
fn rows_past_the_limit_are_split() {
    runtime().block_on(async {
        let config = DispatchConfig { rows_per_message: 7, ..DispatchConfig::new("f") };
        let cluster = Cluster::new(config, &[("a", &ALL)]).await;
        let input = input(5, 50);
        let output = cluster.dispatcher.call(input.clone()).await.unwrap();
        assert_eq!(output.routed, expected(&input).await.routed);
        let shard = cluster.shard("a");
        assert_eq!(shard.calls(), 8);
        assert!(shard.seen.lock().unwrap().iter().all(|batch| batch.rows <= 7));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_placement_gives_the_same_bits(
        owners in proptest::collection::vec(proptest::collection::btree_set(0usize..5, 1..4), GROUPS),
        rows in 1usize..20,
        seed in 0u64..1000,
        limit in 1usize..9,
    ) {
        let names = ["a", "b", "c", "d", "e"];
        let held: Vec<Vec<u32>> =
            (0..5).map(|s| ALL.into_iter().filter(|g| owners[*g as usize].contains(&s)).collect()).collect();
        let shards: Vec<(&str, &[u32])> = names.iter().zip(&held).map(|(name, held)| (*name, &held[..])).collect();
        let (found, expected) = runtime().block_on(async {
            let config = DispatchConfig { rows_per_message: limit, ..DispatchConfig::new("f") };
            let cluster = Cluster::new(config, &shards).await;
            let input = input(seed, rows);
            (cluster.dispatcher.call(input.clone()).await.unwrap(), expected(&input).await)
        });
        prop_assert_eq!(found.routed, expected.routed);
        prop_assert!(!found.mixed_numerics);
    }

    #[test]
    fn a_row_alone_and_in_a_batch_has_the_same_bits(seed in 0u64..1000, rows in 2usize..9) {
        let all = input(seed, rows);
        runtime().block_on(async {
            let together = expected(&all).await;
            for row in 0..rows {
                let mut alone = all.clone();
                alone.rows = 1;
                alone.x = all.x.slice(row * HIDDEN * 2..(row + 1) * HIDDEN * 2);
                alone.logits = all.logits.slice(row * EXPERTS * 4..(row + 1) * EXPERTS * 4);
                let alone = expected(&alone).await;
                assert_eq!(&alone.routed[..], &together.routed[row * HIDDEN * 2..(row + 1) * HIDDEN * 2]);
            }
        });
        prop_assert_eq!(values(seed, 3), values(seed, 3));
    }
}
