//! Golden parity: our logits against those of Hugging Face transformers in fp32 (`tests/golden/README.md`).

#[cfg(feature = "cuda-shim")]
mod cuda;
mod files;
mod forced;
#[cfg(feature = "cuda-shim")]
mod fp8;
#[cfg(feature = "cuda-shim")]
mod pairs;
mod system;
#[cfg(feature = "cuda-shim")]
mod tiled;
#[cfg(feature = "cuda-shim")]
mod tokens;

use std::{sync::Arc, time::Duration};

use conclave_cluster::{EtcdConfig, EtcdMembership};
use conclave_dispatch::{RemoteConfig, RemoteDispatch};
use conclave_kernels::{Cpu, Pool, Reference};
use conclave_tests::{Cluster, ClusterSpec, demo_model};

use files::{cases, demo_sequences};
use forced::Forced;
use system::System;

/// Bound of the reference device: fp32 sums in another order.
const EXACT: f32 = 1e-4;

fn reference() -> Arc<Reference> {
    Arc::new(Reference::new(Pool::new(2).unwrap()))
}

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(Pool::new(2).unwrap(), None).unwrap())
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|v| v.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Prefill in any chunks, and token by token, gives the bits of the full forward; the full forward is the golden one.
#[tokio::test(flavor = "multi_thread")]
async fn reference_device_in_process() {
    for case in cases() {
        let mut system = System::start(&case.dir, reference, 2).await;
        for (i, sequence) in case.sequences.iter().enumerate() {
            let full = system.logits(&sequence.ids, sequence.ids.len()).await;
            let worst = max_difference(&full, &sequence.logits);
            println!("{:16} sequence {i}: {:4} tokens, max difference {worst:.1e}", case.name, sequence.ids.len());
            assert!(worst <= EXACT, "{} sequence {i}: {worst:e}", case.name);
            for chunk in [1, 7, 64] {
                let chunked = system.logits(&sequence.ids, chunk).await;
                assert_eq!(bits(&full), bits(&chunked), "{} sequence {i}: chunks of {chunk}", case.name);
            }
        }
    }
}

/// The same over the wire: a trunk here, dispatch in a router process, experts in two more.
#[tokio::test(flavor = "multi_thread")]
async fn reference_device_over_the_wire() {
    for case in cases() {
        let spec = ClusterSpec { model: case.dir.clone(), device: "reference", ..ClusterSpec::even(2) };
        let cluster = Cluster::start(spec).await.unwrap();
        let config = EtcdConfig::new(vec![cluster.etcd.url.clone()], "default", Duration::from_secs(5));
        let membership = EtcdMembership::connect(config).await.unwrap();
        let mut system = System::start(&case.dir, reference, 1).await;
        let in_process = system.last_logits(&case).await;
        let remote = RemoteDispatch::new(RemoteConfig::new(system.fingerprint(), 77), &membership);
        system.dispatch_by(remote);
        let over_the_wire = system.last_logits(&case).await;
        let worst = max_difference(&over_the_wire, &case.sequences.last().unwrap().logits);
        println!("{:16} over the wire: max difference {worst:.1e}", case.name);
        assert!(worst <= EXACT, "{}: {worst:e}", case.name);
        assert_eq!(bits(&in_process), bits(&over_the_wire), "{}", case.name);
    }
}

/// Mean absolute difference of log probabilities over the vocabulary, and how often the likeliest token is the same.
struct Agreement {
    difference: f64,
    values: usize,
    same: usize,
    positions: usize,
}

impl Agreement {
    fn new() -> Self {
        Self { difference: 0.0, values: 0, same: 0, positions: 0 }
    }

    /// Adds positions; both `[T, vocab]` logits.
    fn add(&mut self, found: &[f32], expected: &[f32], vocab: usize) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.chunks_exact(vocab).zip(expected.chunks_exact(vocab)) {
            let (f, e) = (log_softmax(f), log_softmax(e));
            self.difference += f.iter().zip(&e).map(|(a, b)| (a - b).abs()).sum::<f64>();
            self.values += vocab;
            self.same += usize::from(argmax(&f) == argmax(&e));
            self.positions += 1;
        }
    }

    fn assert(&self, what: &str, mean: f64, top: f64) {
        let (found_mean, found_top) = (self.difference / self.values as f64, self.same as f64 / self.positions as f64);
        println!("{what:24} mean |Δ logprob| {found_mean:.4}, top-1 {:.1} % of {}", found_top * 100.0, self.positions);
        assert!(found_mean <= mean, "{what}: mean {found_mean}, at most {mean} expected");
        assert!(found_top >= top, "{what}: top-1 {found_top}, at least {top} expected");
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let sum: f64 = logits.iter().map(|z| f64::from(z - max).exp()).sum();
    logits.iter().map(|z| f64::from(z - max) - sum.ln()).collect()
}

fn argmax(values: &[f64]) -> usize {
    (0..values.len()).max_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap()
}

/// bf16 with the reference's expert choices, so that no near tie decides the comparison.
#[tokio::test(flavor = "multi_thread")]
async fn cpu_device_with_forced_experts() {
    let mut all = Agreement::new();
    for case in cases() {
        let mut system = System::start(&case.dir, cpu, 1).await;
        let mut agreement = Agreement::new();
        for sequence in &case.sequences {
            let forced = Arc::new(Forced::new(&system, sequence));
            let found = system.logits_by(forced, &sequence.ids).await;
            agreement.add(&found, &sequence.logits, case.vocab);
            all.add(&found, &sequence.logits, case.vocab);
        }
        // Some cases have few positions, where one near tie is two percent.
        agreement.assert(&case.name, 0.03, 0.9);
    }
    all.assert("all cases", 0.03, 0.97);
}

#[tokio::test(flavor = "multi_thread")]
async fn cpu_device_free_running_on_the_demo_checkpoint() {
    let mut system = System::start(&demo_model(), cpu, 1).await;
    let vocab = system.vocab();
    let mut agreement = Agreement::new();
    let (mut same, mut positions, mut difference) = (0usize, 0usize, 0.0);
    for demo in demo_sequences() {
        let found = system.logits(&demo.ids, 512).await;
        agreement.add(&found[demo.start * vocab..], &demo.logits, vocab);
        for (t, row) in found.chunks_exact(vocab).enumerate() {
            let row = log_softmax(row);
            same += usize::from(argmax(&row) == demo.argmax[t]);
            positions += 1;
            if let Some(next) = demo.ids.get(t + 1) {
                difference += (row[*next as usize] - f64::from(demo.logprob[t])).abs();
            }
        }
    }
    agreement.assert("demo, whole vocabulary", 0.03, 0.95);
    let (mean, top) = (difference / positions as f64, same as f64 / positions as f64);
    println!("demo, all positions      mean |Δ logprob| of the next token {mean:.4}, top-1 {:.1} %", top * 100.0);
    assert!(mean <= 0.03 && top >= 0.95, "mean {mean}, top-1 {top}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reference_device_on_the_demo_checkpoint() {
    let mut system = System::start(&demo_model(), reference, 4).await;
    let vocab = system.vocab();
    for (i, demo) in demo_sequences().into_iter().enumerate().filter(|(_, demo)| demo.ids.len() <= 512) {
        let found = system.logits(&demo.ids, 512).await;
        let worst = max_difference(&found[demo.start * vocab..], &demo.logits);
        println!("demo sequence {i}: max difference {worst:.1e}");
        assert!(worst <= EXACT, "sequence {i}: {worst:e}");
    }
}
