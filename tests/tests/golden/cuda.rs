//! The CUDA device on the shim: the demo checkpoint as the other devices compute it.

use std::sync::{Arc, OnceLock};

use conclave_attention::forward::Cut;
use conclave_kernels::{
    Device,
    cuda::{Cuda, GraphCounts, Graphs, Shim},
};
use conclave_tests::demo_model;

use crate::{Agreement, argmax, bits, cpu, files::demo_sequences, log_softmax, reference, system::System};

/// Kernels on the shim are slow: prompts, and tokens after each.
const PROMPTS: usize = 3;
const LENGTH: usize = 10;
const TOKENS: usize = 4;

pub(crate) fn shim() -> Arc<Cuda<Shim>> {
    Arc::new(Cuda::new(Shim::new(5)))
}

/// Prompts continued greedily, and the logits of all their positions but the last.
async fn greedy<D: Device>(device: fn() -> Arc<D>, prompts: &[Vec<u32>]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let mut system = System::start(&demo_model(), device, 2).await;
    let vocab = system.vocab();
    let mut all = Vec::new();
    for prompt in prompts {
        let (mut ids, mut logits) = (prompt.clone(), Vec::new());
        for _ in 0..TOKENS {
            logits = system.logits(&ids, ids.len()).await;
            ids.push(argmax(&log_softmax(&logits[logits.len() - vocab..])) as u32);
        }
        all.push((ids, logits));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn cuda_device_on_the_demo_checkpoint() {
    let prompts: Vec<Vec<u32>> =
        demo_sequences().into_iter().take(PROMPTS).map(|demo| demo.ids[..LENGTH].to_vec()).collect();
    let found = greedy(shim, &prompts).await;
    let on_cpu = greedy(cpu, &prompts).await;
    let mut exact = System::start(&demo_model(), reference, 1).await;
    let mut agreement = Agreement::new();
    for ((ids, logits), (of_cpu, _)) in found.iter().zip(&on_cpu) {
        assert_eq!(ids, of_cpu, "greedy tokens");
        let expected = exact.logits(&ids[..ids.len() - 1], ids.len()).await;
        agreement.add(logits, &expected, exact.vocab());
    }
    agreement.assert("demo, cuda on the shim", 0.03, 0.9);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_on_the_cuda_device_have_the_bits_of_the_whole() {
    let mut system = System::start(&demo_model(), shim, 2).await;
    let ids = demo_sequences()[0].ids[..LENGTH].to_vec();
    let whole = system.logits(&ids, ids.len()).await;
    for chunk in [1, 7] {
        assert_eq!(bits(&system.logits(&ids, chunk).await), bits(&whole), "chunks of {chunk}");
    }
}

/// The same device for all services.
fn graphs() -> Arc<Cuda<Graphs<Shim>>> {
    static DEVICE: OnceLock<Arc<Cuda<Graphs<Shim>>>> = OnceLock::new();
    DEVICE.get_or_init(|| Arc::new(Cuda::new(Graphs::new(Shim::new(5), 1000)))).clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_as_graphs_and_in_halves_have_the_bits_of_the_whole() {
    let ids = demo_sequences()[0].ids[..LENGTH].to_vec();
    let whole = System::start(&demo_model(), shim, 2).await.logits(&ids, ids.len()).await;
    let mut system = System::start(&demo_model(), graphs, 2).await;

    let one_by_one = Cut { chunk: 1, halves: false };
    assert_eq!(bits(&system.logits(&ids, one_by_one).await), bits(&whole), "{one_by_one:?}");
    // Five layers have routed experts: their segments and shared experts, and the end. Nothing changes from token to token. All
    // are graphs from the second token on, but for the first segment, which at the first token still takes memory.
    let GraphCounts { graphs: made, replays, changes, .. } = graphs().driver().counts();
    assert_eq!((made, replays, changes), (11, 11 * (LENGTH as u64 - 1) - 1, 0));

    let halves = Cut { chunk: 4, halves: true };
    assert_eq!(bits(&system.logits(&ids, halves).await), bits(&whole), "{halves:?}");
    let counts = graphs().driver().counts();
    assert!(counts.graphs >= 22 && counts.replays > replays && counts.changes > 0, "{counts:?}");
}
