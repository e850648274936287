//! Surveys see all kinds of problems at once, and everything that can still be seen.

use super::*;
use crate::config::presets;
use crate::sizes::{Part, Sizes};
use crate::sources::SINGLE;
use crate::testing::{self, Stored, fixture, small};
use crate::{BlockQuantization, GateMethod, ModelKind, Scoring};

fn survey(dir: &Path) -> Survey {
    Survey::of(dir.to_str().unwrap()).unwrap()
}

/// The small checkpoint in a new directory, after `edit`.
fn written(edit: impl FnOnce(&mut Vec<Stored>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = testing::tensors(&small());
    edit(&mut tensors);
    testing::write(dir.path(), &small(), &tensors);
    dir
}

fn reasons(survey: &Survey) -> Vec<String> {
    let prefix = format!("{}/", survey.dir.display());
    survey.problems.iter().map(|problem| problem.to_string().replace(&prefix, "")).collect()
}

/// The configuration of a V3 checkpoint.
fn v3() -> ModelConfig {
    ModelConfig {
        kind: ModelKind::DeepseekV3,
        gate_method: GateMethod::NoauxTc,
        scoring: Scoring::Sigmoid,
        quantization: Some(BlockQuantization { rows: 128, cols: 128 }),
        ..small()
    }
}

#[test]
fn a_sound_checkpoint_has_no_problems_and_all_its_sizes() {
    let dir = written(|_| ());
    let survey = survey(dir.path());
    assert!(survey.problems.is_empty(), "{:?}", survey.problems);
    let opened = Checkpoint::open(dir.path().to_str().unwrap()).unwrap();
    assert_eq!(survey.fingerprint.as_deref(), Some(opened.fingerprint()));
    let (stored, sizes) = (&survey.stored, Sizes::of(&small()));
    assert!(stored.covers(&sizes));
    assert_eq!(stored.total_bytes(), opened.total_bytes());
    assert_eq!((stored.cell_bytes(&small()), stored.expert_bytes(&small())), (2 * sizes.cell, 2 * sizes.expert));
    assert_eq!(stored.decoded_bytes(&small()), 2 * sizes.decoded);
    assert_eq!(stored.dtypes.iter().collect::<Vec<_>>(), [(&"BF16", &opened.total_bytes())]);
    let files: Vec<(&str, FileUse)> = survey.files.iter().map(|file| (file.name.as_str(), file.used)).collect();
    assert_eq!(files, [("config.json", FileUse::Document), (SINGLE, FileUse::Tensors)]);
}

#[test]
fn problems_of_all_kinds_are_told_together() {
    let dir = written(|tensors| {
        tensors.remove(0);
        tensors.push(Stored { name: "model.surprise".into(), dtype: "BF16", shape: vec![1], data: vec![0; 2] });
    });
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    fs::write(dir.path().join("generation_config.json"), r#"{"top_p": 2}"#).unwrap();
    let survey = survey(dir.path());
    let reasons = reasons(&survey);
    for (reason, start) in reasons.iter().zip([
        "model.safetensors: tensor model.embed_tokens.weight: missing",
        "model.safetensors: tensor model.surprise: found shape [1]",
        "tokenizer.json: line 1",
        "generation_config.json: top_p: found 2",
    ]) {
        assert!(reason.starts_with(start), "{reason}");
    }
    assert_eq!((reasons.len(), &survey.fingerprint), (4, &None));
    assert_eq!((survey.stored.part(Part::Embed), survey.stored.other_bytes), (0, 2));
    assert!(!survey.stored.covers(&Sizes::of(&small())));
}

#[test]
fn a_broken_configuration_hides_neither_tensors_nor_tokenizer() {
    let dir = written(|_| ());
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    let survey = survey(dir.path());
    let reasons = reasons(&survey);
    assert!(reasons[0].starts_with("config.json: model_type: missing"), "{reasons:?}");
    assert!(reasons[1].starts_with("tokenizer.json: line 1") && reasons.len() == 2, "{reasons:?}");
    assert_eq!(survey.stored.total_bytes(), 2 * Sizes::of(&small()).total());
}

#[test]
fn a_configuration_that_is_refused_is_read_as_far_as_its_sizes_go() {
    let dir = written(|_| ());
    let mut config: serde_json::Value = serde_json::from_str(&small().to_json()).unwrap();
    config["hidden_act"] = "gelu".into();
    config["mlp_bias"] = true.into();
    config["scoring_func"] = "sigmoid".into();
    config["quantization_config"] = serde_json::json!({"quant_method": "awq"});
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let survey = survey(dir.path());
    let reasons = reasons(&survey);
    let fields = ["hidden_act", "mlp_bias", "quantization_config.quant_method", "scoring_func"];
    assert_eq!(reasons.len(), fields.len(), "{reasons:?}");
    for (reason, field) in reasons.iter().zip(fields) {
        assert!(reason.starts_with(&format!("config.json: {field}: found")), "{reason}");
    }
    assert_eq!(Sizes::of(&survey.config.unwrap()), Sizes::of(&small()));
}

#[test]
fn a_file_that_is_cut_short_is_named_once() {
    let dir = written(|_| ());
    let path = dir.path().join(SINGLE);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let survey = survey(dir.path());
    let reasons = reasons(&survey);
    assert!(reasons.len() == 1 && reasons[0].contains("truncated"), "{reasons:?}");
    assert_eq!(survey.config, Some(small()));
    assert_eq!(survey.files[1].used, FileUse::Tensors);
}

#[test]
fn a_configuration_alone_is_surveyed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), presets::v2().to_json()).unwrap();
    let survey = survey(dir.path());
    let reasons = reasons(&survey);
    assert!(reasons.len() == 1 && reasons[0].contains("found neither of model.safetensors"), "{reasons:?}");
    assert_eq!(survey.stored, StoredSizes::default());
    assert_eq!(survey.generation.unwrap().eos, [100001]);
}

#[test]
fn quantised_v3_has_no_problems() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = testing::tensors(&v3());
    let quantised = tensors.iter_mut().filter(|tensor| tensor.name.contains(".experts."));
    let scales: Vec<Stored> = quantised
        .map(|tensor| {
            tensor.dtype = "F8_E4M3";
            tensor.data.truncate(tensor.data.len() / 2);
            let name = format!("{}_scale_inv", tensor.name);
            Stored { name, dtype: "F32", shape: vec![1, 1], data: vec![0; 4] }
        })
        .collect();
    let scale_bytes = 4 * scales.len() as u64;
    tensors.extend(scales);
    testing::write(dir.path(), &v3(), &tensors);
    let survey = survey(dir.path());
    assert!(reasons(&survey).is_empty(), "{:?}", survey.problems);
    let routed = Sizes::of(&v3()).part(Part::Routed);
    assert_eq!(survey.stored.part_bytes(Part::Routed), routed + scale_bytes);
    assert!(survey.stored.covers(&Sizes::of(&v3())));
}

#[test]
fn shards_that_can_be_read_are_counted_without_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    fs::write(dir.path().join("config.json"), small().to_json()).unwrap();
    for (index, tensor) in testing::tensors(&small()).into_iter().enumerate() {
        let file = format!("part-{index}.safetensors");
        map.insert(tensor.name.clone(), file.clone().into());
        fs::write(dir.path().join(file), testing::file(&[tensor])).unwrap();
    }
    fs::write(dir.path().join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    fs::remove_file(dir.path().join("part-3.safetensors")).unwrap();
    fs::write(dir.path().join("part-5.safetensors"), "short").unwrap();
    fs::write(dir.path().join("notes.txt"), "notes").unwrap();
    let survey = survey(dir.path());
    let reasons = reasons(&survey);
    assert!(reasons[0].starts_with("model.safetensors.index.json: shard file part-3.safetensors: missing"));
    assert!(reasons[1].starts_with("part-5.safetensors: truncated") && reasons.len() == 2, "{reasons:?}");
    assert_eq!(survey.stored.tensors, map.len() - 2);
    let of = |name: &str| survey.files.iter().find(|file| file.name == name).map(|file| file.used);
    assert_eq!((of(INDEX), of("notes.txt")), (Some(FileUse::Document), Some(FileUse::Unused)));
    assert_eq!(of("part-5.safetensors"), Some(FileUse::Tensors));
}

#[test]
fn fixtures_have_no_problems() {
    let golden = fixture("golden").into_iter().flat_map(|dir| fs::read_dir(dir).unwrap());
    let dirs = golden.map(|entry| entry.unwrap().path()).chain(fixture("demo-model"));
    for dir in dirs.filter(|dir| dir.join("config.json").exists()) {
        let survey = survey(&dir);
        assert!(survey.problems.is_empty(), "{:?}", survey.problems);
        let config = survey.config.unwrap();
        assert!(survey.stored.covers(&Sizes::of(&config)));
    }
}

#[test]
fn what_is_nowhere_is_not_surveyed() {
    assert!(matches!(Survey::of("no/such-model"), Err(ModelError::NotFound { .. })));
}
