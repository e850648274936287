//! The CUDA device on the shim in place of a chip of sm_90a, on a random checkpoint of sizes that the kernels for it take.

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use conclave_kernels::{
    Dtype, activation,
    cuda::{Cuda, Shim},
};
use conclave_model::synth::{self, Preset, SynthDtype, SynthOptions};
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

/// Rows and columns of a block in FP8.
const BLOCK: usize = 128;

/// The smallest preset with the latents of real models, and weights that make a difference.
fn checkpoint(dir: &Path) {
    write(dir, |_, shape, seed| {
        vec![("", Stored::BF16, shape.to_vec(), activation::encode(Dtype::Bf16, &values(shape, seed)))]
    });
}

/// The same with its projections in FP8.
pub(crate) fn checkpoint_in_fp8(dir: &Path) {
    write(dir, |name, shape, seed| {
        let projection = name.ends_with("_proj.weight") || name.ends_with("_mqa.weight");
        if !projection {
            return vec![("", Stored::BF16, shape.to_vec(), activation::encode(Dtype::Bf16, &values(shape, seed)))];
        }
        // Magnitudes from 4 to 60, in units of scales that differ.
        let unit = values(&[shape[0], shape[1]], seed).into_iter().map(|value| value * (shape[1] as f32 / 3.0).sqrt());
        let bits = unit.map(|unit| (unit.to_bits() >> 24) as u8 & 0x80 | (0x48 + (unit.abs() * 32.0) as u8)).collect();
        let blocks = vec![shape[0].div_ceil(BLOCK), shape[1].div_ceil(BLOCK)];
        let count = blocks[0] * blocks[1];
        let scales = (0..count).map(|block| (0.5 + block as f32 / count as f32) / (30.0 * (shape[1] as f32).sqrt()));
        let scales = activation::encode(Dtype::F32, &scales.collect::<Vec<f32>>());
        vec![("", Stored::F8_E4M3, shape.to_vec(), bits), ("_scale_inv", Stored::F32, blocks, scales)]
    });
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"] = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]});
    fs::write(&path, config.to_string()).unwrap();
}

/// What stands for a tensor: how the name goes on, type, shape and bytes of each part.
type Parts = Vec<(&'static str, Stored, Vec<usize>, Vec<u8>)>;

fn write(dir: &Path, parts: impl Fn(&str, &[usize], u64) -> Parts) {
    let out = dir.to_owned();
    let options =
        SynthOptions { preset: Preset::Tiny, layers: Some(2), vocab: None, dtype: SynthDtype::Bf16, seed: 3, out };
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
    // In order of name, so that every run has the same weights.
    let mut stored = SafeTensors::deserialize(&bytes).unwrap().tensors();
    stored.sort_by(|(one, _), (other, _)| one.cmp(other));
    let mut seed = 1u64;
    let tensors: HashMap<String, (Stored, Vec<usize>, Vec<u8>)> = stored
        .into_iter()
        .flat_map(|(name, tensor)| {
            let mut shape = tensor.shape().to_vec();
            match name.rsplit('.').nth(1).unwrap() {
                "kv_a_proj_with_mqa" => shape[0] = LATENT + ROPE,
                "kv_a_layernorm" => shape[0] = LATENT,
                "kv_b_proj" => shape[1] = LATENT,
                "q_b_proj" => shape[0] = heads * (nope + ROPE),
                _ => {}
            }
            seed += 1;
            let parts = parts(&name, &shape, seed);
            parts
                .into_iter()
                .map(move |(ending, stored, shape, bytes)| (format!("{name}{ending}"), (stored, shape, bytes)))
        })
        .collect();
    files.iter().filter(|path| path.to_string_lossy().contains("safetensors")).for_each(|path| {
        fs::remove_file(path).unwrap();
    });
    let views = tensors
        .iter()
        .map(|(name, (stored, shape, bytes))| (name.as_str(), TensorView::new(*stored, shape.clone(), bytes).unwrap()));
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
