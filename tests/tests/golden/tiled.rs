//! The CUDA device on the shim in place of a chip of sm_90a, on a random checkpoint of sizes that the kernels for it take.

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use conclave_kernels::{
    Dtype, activation,
    cuda::{Cuda, Shim},
};
use conclave_model::synth::{self, Preset, SynthOptions};
use safetensors::{
    SafeTensors,
    tensor::{Dtype as Stored, TensorView, serialize_to_file},
};
use serde_json::{Value, json};

use crate::{Agreement, bits, reference, system::System};

/// What the smallest preset has otherwise: elements of a latent and of its roped key.
const LATENT: usize = 512;
const ROPE: usize = 64;

fn shim() -> Arc<Cuda<Shim>> {
    Arc::new(Cuda::new(Shim::sm90(9)))
}

/// The smallest preset with the latents of real models, and weights that make a difference.
fn checkpoint(dir: &Path) {
    let out = dir.to_owned();
    let options = SynthOptions { preset: Preset::Tiny, layers: Some(2), vocab: None, seed: 3, out };
    let written = synth::write(&options, &|_, _| ()).unwrap();
    let (heads, nope) = (written.config.heads, written.config.qk_nope);
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["kv_lora_rank"] = json!(LATENT);
    config["qk_rope_head_dim"] = json!(ROPE);
    fs::write(&path, config.to_string()).unwrap();

    let files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    let file = files.iter().find(|path| path.extension().is_some_and(|found| found == "safetensors")).unwrap();
    let bytes = fs::read(file).unwrap();
    let mut seed = 1u64;
    let tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let mut shape = tensor.shape().to_vec();
            match name.rsplit('.').nth(1).unwrap() {
                "kv_a_proj_with_mqa" => shape[0] = LATENT + ROPE,
                "kv_a_layernorm" => shape[0] = LATENT,
                "kv_b_proj" => shape[1] = LATENT,
                "q_b_proj" => shape[0] = heads * (nope + ROPE),
                _ => {}
            }
            seed += 1;
            let values = values(&shape, seed);
            (name, (shape, activation::encode(Dtype::Bf16, &values)))
        })
        .collect();
    files.iter().filter(|path| path.to_string_lossy().contains("safetensors")).for_each(|path| {
        fs::remove_file(path).unwrap();
    });
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name.as_str(), TensorView::new(Stored::BF16, shape.clone(), bytes).unwrap()));
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Norms are 1, matrices keep the size of their inputs.
fn values(shape: &[usize], seed: u64) -> Vec<f32> {
    let [outputs, inputs] = shape else { return vec![1.0; shape[0]] };
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let scale = (3.0 / *inputs as f32).sqrt();
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    };
    (0..outputs * inputs).map(|_| next()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_for_sm90_on_a_checkpoint_that_fits_them() {
    let dir = tempfile::tempdir().unwrap();
    checkpoint(dir.path());
    let ids = [0, 17, 3, 400, 21, 8];
    let mut system = System::start(dir.path(), shim, 2).await;
    let whole = system.logits(&ids, ids.len()).await;
    assert_eq!(bits(&system.logits(&ids, 2).await), bits(&whole), "chunks of 2");
    let mut exact = System::start(dir.path(), reference, 1).await;
    let expected = exact.logits(&ids, ids.len()).await;
    let mut agreement = Agreement::new();
    agreement.add(&whole, &expected, exact.vocab());
    agreement.assert("kernels for sm_90a on the shim", 0.02, 0.9);
}
