//! Whole checkpoints: read back, refused by name, told apart.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::BlockQuantization;
use crate::sources::{INDEX, SINGLE};
use crate::testing::{self, Stored, fixture, small};

fn open(dir: &Path) -> Result<Checkpoint, ModelError> {
    Checkpoint::open(dir.to_str().unwrap())
}

/// A small checkpoint after `edit`, opened.
fn edited(edit: impl FnOnce(&mut Vec<Stored>)) -> Result<Checkpoint, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = testing::tensors(&small());
    edit(&mut tensors);
    testing::write(dir.path(), &small(), &tensors);
    open(dir.path())
}

fn refused(edit: impl FnOnce(&mut Vec<Stored>)) -> TensorError {
    match edited(edit) {
        Err(ModelError::Tensor { error, path }) => {
            assert!(path.ends_with("model.safetensors"), "{}", path.display());
            error
        }
        other => panic!("{other:?}"),
    }
}

/// The small checkpoint in two files, the tensors dealt alternately.
fn write_sharded(dir: &Path) {
    fs::write(dir.join("config.json"), small().to_json()).unwrap();
    let (mut odd, mut even) = (Vec::new(), Vec::new());
    for (index, tensor) in testing::tensors(&small()).into_iter().enumerate() {
        if index % 2 == 0 { even.push(tensor) } else { odd.push(tensor) }
    }
    let mut map = serde_json::Map::new();
    for (name, tensors) in [("odd.safetensors", odd), ("even.safetensors", even)] {
        map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        fs::write(dir.join(name), testing::file(&tensors)).unwrap();
    }
    fs::write(dir.join(INDEX), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
}

fn bump(tensors: &mut [Stored], name: &str) {
    let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    tensor.data.iter_mut().for_each(|byte| *byte ^= 1);
}

#[test]
fn tensors_read_as_they_were_written() {
    let checkpoint = edited(|_| ()).unwrap();
    for stored in testing::tensors(&small()) {
        let weight = checkpoint.weight(&stored.name).unwrap();
        assert_eq!((weight.data, weight.dtype, weight.transposed), (stored.data.as_slice(), Dtype::Bf16, false));
        assert_eq!((weight.rows, weight.cols), (stored.shape[0], stored.shape.get(1).copied().unwrap_or(1)));
    }
    let norm = checkpoint.vector(&names::final_norm()).unwrap();
    assert_eq!(norm.len(), 8);
    let first = testing::data(&checkpoint, &names::final_norm())[..2].try_into().unwrap();
    assert_eq!(norm[0], bf16::from_le_bytes(first).to_f32());
}

#[test]
fn f32_tensors_at_odd_offsets_are_read() {
    let name = names::final_norm();
    let values = [1.5f32, -2.0, 0.25, 3.0, 1e-3, 7.0, 8.0, 9.0];
    let checkpoint = edited(|tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
        norm.dtype = "F32";
        norm.data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let ignored = "model.layers.0.self_attn.rotary_emb.inv_freq".to_string();
        tensors.insert(0, Stored { name: ignored, dtype: "U8", shape: vec![3], data: vec![0; 3] });
    });
    assert_eq!(checkpoint.unwrap().vector(&name).unwrap(), values);
}

#[test]
fn released_pages_read_the_same() {
    let checkpoint = edited(|_| ()).unwrap();
    let before = testing::data(&checkpoint, &names::embed());
    checkpoint.release(&names::embed());
    checkpoint.release("no such tensor");
    assert_eq!(testing::data(&checkpoint, &names::embed()), before);
}

#[test]
fn wrong_uses_are_refused() {
    let checkpoint = edited(|_| ()).unwrap();
    assert!(matches!(checkpoint.weight("nothing"), Err(ModelError::NoSuchTensor { .. })));
    let message = checkpoint.vector(&names::embed()).unwrap_err().to_string();
    assert_eq!(message, "tensor model.embed_tokens.weight: found shape [24, 8], expected one dimension");
}

#[test]
fn missing_extra_and_misshaped_tensors_are_refused() {
    let missing = refused(|tensors| tensors.retain(|tensor| tensor.name != names::layer(1).expert(3).up_proj()));
    let tensor = "model.layers.1.mlp.experts.3.up_proj.weight".to_string();
    assert_eq!(missing, TensorError::Missing { tensor, expected: vec![4, 8] });

    let extra = refused(|tensors| {
        let name = "model.layers.2.input_layernorm.weight".into();
        tensors.push(Stored { name, dtype: "BF16", shape: vec![1], data: vec![0; 2] });
    });
    assert!(matches!(&extra, TensorError::Extra { tensor, .. } if tensor.starts_with("model.layers.2.")), "{extra}");

    let shape = refused(|tensors| tensors[0].shape = vec![8, 24]);
    let tensor = names::embed();
    assert_eq!(shape, TensorError::Shape { tensor, found: vec![8, 24], expected: vec![24, 8] });
}

#[test]
fn types_that_are_not_served_are_refused_by_name() {
    for (dtype, size) in [("F16", 2), ("F8_E4M3", 1)] {
        let error = refused(|tensors| {
            tensors[0].dtype = dtype;
            tensors[0].data.truncate(24 * 8 * size);
        });
        assert_eq!(error, TensorError::UnsupportedDtype { tensor: names::embed(), found: dtype });
    }
}

#[test]
fn shared_experts_that_the_config_denies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let denied = ModelConfig { shared_experts: None, ..small() };
    testing::write(dir.path(), &denied, &testing::tensors(&small()));
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(error, ModelError::Tensor { error: TensorError::SharedExperts { .. }, .. }), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    testing::write(dir.path(), &small(), &testing::tensors(&small()));
    let path = dir.path().join(SINGLE);
    let whole = fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = open(dir.path()).unwrap_err();
        let truncated = matches!(
            error,
            ModelError::Tensor { error: TensorError::Truncated { .. } | TensorError::OutOfFile { .. }, .. }
        );
        assert!(truncated, "{length}: {error}");
    }
}

#[test]
fn shards_read_as_one_file_does() {
    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path());
    let sharded = open(dir.path()).unwrap();
    let single = edited(|_| ()).unwrap();
    assert_eq!(sharded.fingerprint(), single.fingerprint());
    assert_eq!(sharded.total_bytes(), single.total_bytes());
    for tensor in single.tensors() {
        assert_eq!(testing::data(&sharded, tensor.name), testing::data(&single, tensor.name));
    }
}

#[test]
fn a_missing_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path());
    fs::remove_file(dir.path().join("odd.safetensors")).unwrap();
    let error = open(dir.path()).unwrap_err();
    let named = matches!(&error, ModelError::Tensor { error: TensorError::MissingShard { file, .. }, .. } if file == "odd.safetensors");
    assert!(named, "{error}");
    assert!(error.to_string().contains("model.safetensors.index.json"), "{error}");
}

#[test]
fn a_directory_without_weights_or_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(&error, ModelError::Io { path, .. } if path.ends_with("config.json")), "{error}");
    fs::write(dir.path().join("config.json"), small().to_json()).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(error, ModelError::Tensor { error: TensorError::NoWeights, .. }), "{error}");
}

#[test]
fn the_fingerprint_tells_checkpoints_apart() {
    let original = edited(|_| ()).unwrap();
    assert_eq!(original.fingerprint().len(), 64);
    assert_eq!(original.fingerprint(), edited(|_| ()).unwrap().fingerprint());
    let other = edited(|tensors| bump(tensors, &names::layer(1).expert(2).down_proj())).unwrap();
    assert_ne!(original.fingerprint(), other.fingerprint());
}

#[test]
fn the_fingerprint_covers_config_and_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    testing::write(dir.path(), &small(), &testing::tensors(&small()));
    seen.insert(open(dir.path()).unwrap().fingerprint().to_string());
    for (file, text) in [("tokenizer.json", "{}"), ("tokenizer_config.json", "{}"), ("chat_template.jinja", "x")] {
        fs::write(dir.path().join(file), text).unwrap();
        assert!(seen.insert(open(dir.path()).unwrap().fingerprint().to_string()), "{file}");
    }
    let scaled = ModelConfig { routed_scaling_factor: 2.0, ..small() };
    fs::write(dir.path().join("config.json"), scaled.to_json()).unwrap();
    assert!(seen.insert(open(dir.path()).unwrap().fingerprint().to_string()));
}

#[test]
fn weights_larger_than_memory_are_refused_with_both_numbers() {
    let checkpoint = edited(|_| ()).unwrap();
    checkpoint.check_memory(1).unwrap();
    let error = checkpoint.check_memory(1 << 60).unwrap_err();
    let ModelError::WeightsDoNotFit { needed, available, .. } = error else { panic!("{error}") };
    assert!(needed == 1 << 60 && available > 0);
    assert!(error.to_string().contains(&available.to_string()), "{error}");
}

/// A V3 checkpoint as it will be read: gate biases, and one more layer that is skipped.
fn v3(bias: f32) -> Result<Checkpoint, ModelError> {
    let config = ModelConfig {
        kind: crate::ModelKind::DeepseekV3,
        gate_method: GateMethod::NoauxTc,
        scoring: crate::Scoring::Sigmoid,
        ..small()
    };
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = testing::tensors(&config);
    let gate = tensors.iter_mut().find(|tensor| tensor.name == names::layer(1).gate_bias()).unwrap();
    gate.dtype = "F32";
    gate.data = [1.0, 2.0, bias, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let name = "model.layers.2.eh_proj.weight".into();
    tensors.push(Stored { name, dtype: "F8_E4M3", shape: vec![2], data: vec![0; 2] });
    testing::write(dir.path(), &config, &tensors);
    open(dir.path())
}

#[test]
fn v3_reads_its_biases_and_skips_the_speculation_layer() {
    assert_eq!(v3(3.0).unwrap().vector(&names::layer(1).gate_bias()).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    for bias in [f32::NAN, f32::INFINITY] {
        let error = v3(bias).unwrap_err();
        assert!(
            matches!(error, ModelError::Tensor { error: TensorError::NonFinite { position: 2, .. }, .. }),
            "{error}"
        );
    }
}

/// A checkpoint whose matrix `[8, 8]` (the output projection of the first layer's attention) is in FP8, in blocks of 4 × 8.
fn quantised(change: impl FnOnce(&mut Vec<Stored>)) -> Result<Checkpoint, ModelError> {
    let config = ModelConfig { quantization: Some(BlockQuantization { rows: 4, cols: 8 }), ..small() };
    let mut tensors = testing::tensors(&config);
    let name = names::layer(0).o_proj();
    let matrix = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    assert_eq!(matrix.shape, [8, 8]);
    (matrix.dtype, matrix.data) = ("F8_E4M3", [[0x38; 32], [0xc0; 32]].concat());
    let data = [0.5f32, 3.0].iter().flat_map(|scale| scale.to_le_bytes()).collect();
    tensors.push(Stored { name: names::scales(&name), dtype: "F32", shape: vec![2, 1], data });
    change(&mut tensors);
    let dir = tempfile::tempdir().unwrap();
    testing::write(dir.path(), &config, &tensors);
    open(dir.path())
}

#[test]
fn weights_in_fp8_come_with_their_scales() {
    let (checkpoint, name) = (quantised(|_| ()).unwrap(), names::layer(0).o_proj());
    let weight = checkpoint.weight(&name).unwrap();
    assert_eq!((weight.data, weight.shape()), (&[[0x38; 32], [0xc0; 32]].concat()[..], (8, 8)));
    let scales = weight.scales.unwrap();
    assert_eq!((scales.block, scales.data), ((4, 8), &[0.5f32.to_le_bytes(), 3f32.to_le_bytes()].concat()[..]));
    assert!(checkpoint.weight(&names::layer(1).o_proj()).unwrap().scales.is_none());
}

#[test]
fn what_a_checkpoint_takes_depends_on_what_becomes_of_fp8() {
    let (checkpoint, name) = (quantised(|_| ()).unwrap(), names::layer(0).o_proj());
    let of =
        |name: &str| [Fp8Weights::Kept, Fp8Weights::Widened].map(|fp8| checkpoint.loaded_bytes_of(name, fp8).unwrap());
    assert_eq!((checkpoint.bytes_of(&name), of(&name), of(&names::scales(&name))), (Some(64 + 8), [64, 128], [8, 0]));
    assert_eq!(of(&names::embed()), [24 * 8 * 2; 2]);
    assert_eq!(checkpoint.loaded_bytes(Fp8Weights::Kept), checkpoint.total_bytes());
    assert_eq!(checkpoint.loaded_bytes(Fp8Weights::Widened), checkpoint.total_bytes() + 64 - 8);
    let scales = checkpoint.tensors().find(|tensor| tensor.is_scales).unwrap();
    assert_eq!(scales.name, names::scales(&name));
}

#[test]
fn quantised_weights_need_their_scales() {
    let refusal = |change: fn(&mut Vec<Stored>)| quantised(change).unwrap_err().to_string();
    let error = refusal(|tensors| drop(tensors.pop()));
    assert!(error.contains("o_proj.weight_scale_inv: missing, expected shape [2, 1]"), "{error}");
    let error = refusal(|tensors| tensors.last_mut().unwrap().shape = vec![1, 2]);
    assert!(error.contains("o_proj.weight_scale_inv: found shape [1, 2], expected [2, 1]"), "{error}");
    let error = refusal(|tensors| {
        let scales = tensors.last_mut().unwrap();
        (scales.dtype, scales.data) = ("BF16", vec![0; 4]);
    });
    assert!(error.contains("o_proj.weight_scale_inv: dtype: found BF16, expected F32"), "{error}");
    let error = refusal(|tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == names::embed()).unwrap();
        (norm.dtype, norm.data) = ("F8_E4M3", vec![0; norm.data.len() / 2]);
    });
    assert!(error.contains("embed_tokens.weight: dtype: found F8_E4M3, expected BF16 or F32"), "{error}");
}

#[test]
fn fixtures_open() {
    let golden = fixture("golden").into_iter().flat_map(|dir| fs::read_dir(dir).unwrap());
    let dirs: Vec<PathBuf> = golden.map(|entry| entry.unwrap().path()).chain(fixture("demo-model")).collect();
    for dir in dirs.iter().filter(|dir| dir.join("config.json").exists()) {
        let checkpoint = open(dir).unwrap_or_else(|error| panic!("{error}"));
        let parameters = crate::sizes::Sizes::of(checkpoint.config()).total();
        let weights = checkpoint.tensors().filter(|tensor| !tensor.is_scales);
        let elements: usize = weights.map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(parameters, elements as u64, "{}", dir.display());
    }
}

#[test]
fn checkpoint_and_text_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
    shared::<crate::Text>();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_changed_file_panics(changes in proptest::collection::vec((0usize..600, any::<u8>()), 1..4), cut in 0usize..400) {
        let dir = tempfile::tempdir().unwrap();
        testing::write(dir.path(), &small(), &testing::tensors(&small()));
        let path = dir.path().join(SINGLE);
        let mut bytes = fs::read(&path).unwrap();
        changes.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        bytes.truncate(bytes.len() - cut);
        fs::write(&path, bytes).unwrap();
        let _ = open(dir.path());
    }
}
