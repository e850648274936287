//! Checkpoints that must be refused at start, as a person meets the refusal: one line on stderr that names the thing.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use conclave_tests::{binary, demo_copy};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Of the demo checkpoint.
const LAYERS: u64 = 6;

fn serve(dir: &Path) -> Output {
    let out = Command::new("timeout")
        .arg("20")
        .arg(binary())
        .args(["serve", "--http=127.0.0.1:0", "--grpc=127.0.0.1:0", "--model"])
        .arg(dir)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stderr));
    out
}

/// Serves the checkpoint and wants a refusal with all of these words.
fn refused(dir: &TempDir, words: &[&str]) {
    let out = serve(dir.path());
    let text = String::from_utf8_lossy(&out.stderr);
    for word in words {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

fn with_config(change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = demo_copy();
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
    dir
}

/// Rewrites the header of the weights file; the data stay as they are.
fn with_header(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> TempDir {
    let dir = demo_copy();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(header.as_object_mut().unwrap());
    let header = serde_json::to_vec(&header).unwrap();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(&bytes[8 + length..]);
    fs::write(path, out).unwrap();
    dir
}

#[test]
fn configs_that_say_what_is_not_supported() {
    let cases: [(&str, Value, &[&str]); 14] = [
        ("hidden_act", json!("gelu"), &["gelu", "silu"]),
        ("attention_bias", json!(true), &["true"]),
        ("mlp_bias", json!(true), &["true"]),
        ("num_key_value_heads", json!(4), &["4", "8"]),
        ("tie_word_embeddings", json!(true), &["true"]),
        ("rope_scaling", json!({"type": "linear", "factor": 2}), &["linear", "yarn"]),
        ("topk_method", json!("random"), &["random"]),
        ("scoring_func", json!("tanh"), &["tanh", "softmax"]),
        ("n_group", json!(5), &["32", "5"]),
        ("topk_group", json!(9), &["9", "8"]),
        ("num_experts_per_tok", json!(33), &["33"]),
        ("qk_rope_head_dim", json!(31), &["31"]),
        ("moe_layer_freq", json!(0), &["0"]),
        ("hidden_size", json!("big"), &["big"]),
    ];
    for (field, value, words) in cases {
        let dir = with_config(|config| config[field] = value);
        refused(&dir, &[&[field], words].concat());
    }
}

#[test]
fn configs_that_are_no_configs() {
    let dir = demo_copy();
    fs::write(dir.path().join("config.json"), "{\"hidden_size\": 256,").unwrap();
    refused(&dir, &["config.json", "line 1"]);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(&dir, &["config.json"]);
    let dir = with_config(|config| drop(config.as_object_mut().unwrap().remove("kv_lora_rank")));
    refused(&dir, &["kv_lora_rank"]);
    let dir = demo_copy();
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    refused(&dir, &["tokenizer.json"]);
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    let gate = "model.layers.3.mlp.gate.weight";
    let layers = |more: u64| move |config: &mut Value| config["num_hidden_layers"] = json!(LAYERS + more);
    refused(&with_config(layers(1)), &["model.layers.6.", "missing"]);
    refused(&with_header(|h| drop(h.remove(gate))), &["gap"]);
    refused(&with_header(|h| h[gate]["shape"] = json!([256, 32])), &[gate, "256"]);
    refused(&with_header(|h| h[gate]["dtype"] = json!("F16")), &[gate, "F16"]);
    refused(&with_header(|h| h[gate]["dtype"] = json!("F99")), &["F99"]);
    let extra = with_header(|h| {
        let tensor = h[gate].clone();
        h.insert("model.layers.99.surprise".into(), tensor);
    });
    refused(&extra, &["model.layers.99.surprise"]);
    refused(
        &with_header(|h| {
            let begin = h[gate]["data_offsets"][0].as_u64().unwrap();
            h[gate]["data_offsets"] = json!([begin + 2, begin + 2 + 32 * 256 * 2]);
        }),
        &["model.safetensors"],
    );
}

#[test]
fn files_that_are_cut_short_or_listed_wrongly() {
    let dir = demo_copy();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    refused(&dir, &["model.safetensors"]);
    fs::write(&path, &bytes[..4]).unwrap();
    refused(&dir, &["model.safetensors"]);
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    refused(&dir, &["model.safetensors"]);

    fs::remove_file(&path).unwrap();
    refused(&dir, &["model.safetensors", "model.safetensors.index.json"]);
    fs::write(dir.path().join("model.safetensors.index.json"), "[1, 2").unwrap();
    refused(&dir, &["model.safetensors.index.json"]);
    let index = json!({"weight_map": {"model.norm.weight": "model-00001-of-000002.safetensors"}});
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    refused(&dir, &["model-00001-of-000002.safetensors"]);
}

#[test]
fn a_folder_that_is_not_there_and_a_name_that_is_not_cached() {
    let dir = TempDir::new().unwrap();
    refused(&dir, &["config.json"]);
    let out = serve(Path::new("nobody/nothing-v9"));
    assert!(String::from_utf8_lossy(&out.stderr).contains("nobody/nothing-v9"));
}
