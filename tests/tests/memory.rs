//! What a shard keeps in memory: its cells, once, and little else.

use std::process::Command;

use conclave_tests::{Cluster, ClusterSpec, binary, greedy, tokens};

/// Layer shapes of V2-Lite: 5 MoE layers of 64 experts, three matrices of 1408 x 2048 each, bf16.
const CELL_BYTES: u64 = 5 * 16 * 3 * 1408 * 2048 * 2;

#[tokio::test(flavor = "multi_thread")]
async fn an_expert_holds_its_cells_once() {
    let dir = tempfile::TempDir::new().unwrap();
    let model = dir.path().join("lite6");
    let status = Command::new(binary())
        .args(["synth", "--preset=v2-lite", "--layers=6", "--vocab=32000", "--out"])
        .arg(&model)
        .status()
        .unwrap();
    assert!(status.success());

    let spec = ClusterSpec { model, ..ClusterSpec::even(4) };
    let cluster = Cluster::start(spec).await.unwrap();
    let prompt: Vec<u32> = (0..64).map(|i| 100 + i * 37).collect();
    let answer = cluster.client().await.unwrap().generate(greedy(tokens(&prompt), 4)).await.unwrap();
    assert_eq!(answer.tokens.len(), 4);

    let limit = CELL_BYTES * 11 / 10 + 100 * 1_000_000;
    for expert in &cluster.experts {
        let resident = expert.resident().unwrap();
        println!("cells {:.0} MB, resident {:.0} MB", CELL_BYTES as f64 / 1e6, resident as f64 / 1e6);
        assert!(resident <= limit, "{resident} bytes resident, {limit} allowed");
        assert!(resident >= CELL_BYTES, "{resident} bytes resident: less than the {CELL_BYTES} bytes of its cells");
    }
}
