//! Checkpoints in FP8: on the CPU, which keeps the weights so, and on the CUDA device, which also multiplies in FP8: rows are rounded to
//! it before each product, as in the model's own inference code, and as the golden logits, whose weights are widened, do not know.

use std::{path::Path, sync::Arc};

use conclave_kernels::{
    Device, Fp8Weights,
    cuda::{Cuda, Shim},
};

use crate::{
    Agreement, bits, cpu, cuda::shim, files::cases, forced::Forced, reference, system::System, tiled::checkpoint_in_fp8,
};

fn golden() -> crate::files::Case {
    cases().into_iter().find(|case| case.name == "v3_fp8").expect("fixtures/golden/v3_fp8")
}

/// Inputs of products are off by 2.6 % in the mean square, a block of three products by 4 to 5 %; the CPU device, where those are
/// off by 0.17 % and so are latents and weights, finds 0.009 here. 0.067 was found: more than half as much again fails.
#[tokio::test(flavor = "multi_thread")]
async fn cuda_device_in_fp8_with_forced_experts() {
    let (case, mut agreement) = (golden(), Agreement::new());
    let mut system = System::start(&case.dir, shim, 1).await;
    for sequence in &case.sequences {
        let forced = Arc::new(Forced::new(&system, sequence));
        let found = system.logits_by(forced, &sequence.ids).await;
        agreement.add(&found, &sequence.logits, case.vocab);
    }
    agreement.assert("v3_fp8, cuda on the shim", 0.1, 0.85);
}

async fn logits<D: Device>(dir: &Path, device: fn() -> Arc<D>, shards: u32, ids: &[u32], chunk: usize) -> Vec<f32> {
    System::start(dir, device, shards).await.logits(ids, chunk).await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_fp8_bits_do_not_depend_on_shards_and_chunks() {
    let case = golden();
    let ids = &case.sequences[1].ids[..24];
    let whole = logits(&case.dir, shim, 1, ids, ids.len()).await;
    for (shards, chunk) in [(3, ids.len()), (2, 7), (1, 1)] {
        let found = logits(&case.dir, shim, shards, ids, chunk).await;
        assert_eq!(bits(&found), bits(&whole), "{shards} shards, chunks of {chunk}");
    }
}

fn sm90() -> Arc<Cuda<Shim>> {
    Arc::new(Cuda::new(Shim::sm90(9)))
}

/// A checkpoint in blocks of 128 x 128, over one shard and over two, beside the reference.
async fn in_large_blocks<D: Device>(device: fn() -> Arc<D>, what: &str, mean: f64) {
    let dir = tempfile::tempdir().unwrap();
    checkpoint_in_fp8(dir.path());
    let (dir, ids) = (dir.path().to_owned(), [0, 17, 3, 400, 21, 8]);
    let whole = logits(&dir, device, 1, &ids, ids.len()).await;
    let apart = logits(&dir, device, 2, &ids, 2).await;
    assert_eq!(bits(&apart), bits(&whole), "2 shards, chunks of 2");
    let mut exact = System::start(&dir, reference, 1).await;
    let expected = exact.logits(&ids, ids.len()).await;
    let mut agreement = Agreement::new();
    agreement.add(&whole, &expected, exact.vocab());
    agreement.assert(what, mean, 0.6);
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_for_sm90_on_a_checkpoint_in_fp8_that_fits_them() {
    in_large_blocks(sm90, "in FP8, kernels for sm_90a on the shim", 0.1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cpu_on_a_checkpoint_whose_fp8_it_keeps() {
    assert_eq!(cpu().fp8_weights(), Fp8Weights::Kept);
    in_large_blocks(cpu, "in FP8, on the CPU", 0.03).await;
}
