//! `conclave inspect` and `conclave synth` as a person runs them: what they print, and the exit code.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use conclave_kernels::Fp8Weights;
use conclave_model::Checkpoint;
use conclave_proto::v1::GenerateRequest;
use conclave_tests::{Cluster, ClusterSpec, Process, Serve, binary, demo_copy, demo_model, greedy, tokens};
use serde_json::{Value, json};
use tempfile::TempDir;

fn conclave(args: &[&str]) -> Output {
    Command::new(binary()).args(args).env_remove("CONCLAVE_MODEL").output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a command that must succeed prints.
fn printed(args: &[&str]) -> String {
    let output = conclave(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
    stdout(&output)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_demo_model_is_described_in_eighty_columns() {
    let dir = demo_model();
    let shown = printed(&["inspect", text(&dir)]);
    for words in [
        "deepseek_v2: 6 layers (1 dense, 5 MoE), hidden 256, vocab 4,096",
        "group_limited_greedy over softmax scores, from at most 3 of 8",
        "routed experts   7,864,320  15.7 MB  62.6 %",
        "4 experts of every MoE layer: 983,040 parameters",
        "6.17 M of 12.6 M parameters a token",
        "1,536 bytes a token in bf16; 699,008 tokens fit into 1 GiB",
        "0 <｜begin▁of▁sentence｜>; text prompts begin with it",
        "sampled, temperature 0.3, top-p 0.95; ends at token 1",
        "can be served: conclave serve --model",
    ] {
        assert!(shown.contains(words), "{words:?} in\n{shown}");
    }
    let is_path = |line: &&str| line.contains(text(&dir));
    assert!(shown.lines().filter(|line| !is_path(line)).all(|line| line.chars().count() <= 80), "{shown}");
    assert!(!shown.contains('\x1b'), "colour without a terminal: {shown:?}");
}

#[test]
fn json_of_the_demo_model_has_exact_numbers() {
    let report = json(&printed(&["inspect", "--json", text(&demo_model())]));
    let checkpoint = Checkpoint::open(text(&demo_model())).unwrap();
    assert_eq!(report["fingerprint"], checkpoint.fingerprint());
    assert_eq!(report["weights"]["bytes"], checkpoint.total_bytes());
    assert_eq!(
        (&report["figures"]["bytes"], &report["figures"]["cells"]),
        (&json!(checkpoint.total_bytes()), &json!(8))
    );
    assert_eq!(report["figures"]["cell_bytes"], checkpoint.cell_bytes(Fp8Weights::Widened));
    assert_eq!(report["config"]["topk_group"], 3);
    assert_eq!((&report["servable"], &report["refused"]), (&json!(true), &json!([])));
    assert_eq!(report["tokenizer"]["chat_template"], true);
}

#[test]
fn a_refused_checkpoint_is_shown_with_every_reason() {
    let dir = demo_copy();
    let path = dir.path().join("config.json");
    let mut config = json(&fs::read_to_string(&path).unwrap());
    config["hidden_act"] = "gelu".into();
    config["moe_intermediate_size"] = 32.into();
    fs::write(&path, config.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer.json"), r#"{"model": "#).unwrap();
    fs::write(dir.path().join("generation_config.json"), r#"{"top_p": 7}"#).unwrap();

    let output = conclave(&["inspect", text(dir.path())]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let shown = stdout(&output);
    for words in [
        "deepseek_v2: 6 layers (1 dense, 5 MoE), hidden 256",
        "refused: config.json: hidden_act: found \"gelu\"",
        "refused: model.safetensors: tensor model.layers.1.mlp.shared_experts.gate_proj.weight: found shape [128, 256], expected [64, 256]",
        "more like it)",
        "refused: tokenizer.json: line 1",
        "refused: generation_config.json: top_p: found 7, expected above 0, at most 1",
    ] {
        assert!(shown.contains(words), "{words:?} in\n{shown}");
    }
    assert!(!shown.contains("can be served"), "{shown}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("would be refused"), "{output:?}");

    let output = conclave(&["inspect", "--json", text(dir.path())]);
    let report = json(&stdout(&output));
    assert_eq!((output.status.code(), &report["servable"]), (Some(1), &json!(false)));
    assert_eq!((&report["config"]["model_type"], &report["fingerprint"]), (&json!("deepseek_v2"), &Value::Null));
}

#[test]
fn a_configuration_alone_and_a_truncated_file_are_shown_too() {
    let dir = demo_copy();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let shown = stdout(&conclave(&["inspect", text(dir.path())]));
    assert!(shown.contains("routed experts") && shown.contains("refused: model.safetensors: tensor "), "{shown}");

    fs::remove_file(&path).unwrap();
    let output = conclave(&["inspect", text(dir.path())]);
    let shown = stdout(&output);
    assert!(shown.contains("as they would be in bf16") && shown.contains("12,563,008"), "{shown}");
    assert!(shown.contains("refused: weights: found neither of model.safetensors"), "{shown}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn what_is_nowhere_is_an_error_and_no_report() {
    let output = conclave(&["inspect", "nobody/nothing-v9"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("nobody/nothing-v9"), "{output:?}");
}

#[test]
fn a_synthetic_checkpoint_can_be_inspected_and_is_not_written_over() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("tiny");
    let shown = printed(&["synth", "--preset", "tiny", "--layers", "3", "--dry-run"]);
    assert!(shown.contains("3 layers (1 dense, 2 MoE)") && shown.contains("in 1 file"), "{shown}");
    assert!(!out.exists());

    let shown = printed(&["synth", "--preset", "tiny", "--layers", "3", "--vocab", "300", "--out", text(&out)]);
    assert!(shown.contains(&format!("\n  conclave serve --model {}\n", text(&out))), "{shown}");
    let report = json(&printed(&["inspect", "--json", text(&out)]));
    assert_eq!((&report["config"]["num_hidden_layers"], &report["config"]["vocab_size"]), (&json!(3), &json!(300)));
    assert_eq!((&report["tokenizer"], &report["servable"]), (&Value::Null, &json!(true)));

    let output = conclave(&["synth", "--preset", "tiny", "--out", text(&out)]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected a new or empty directory"), "{output:?}");
    assert_eq!(json(&printed(&["inspect", "--json", text(&out)]))["fingerprint"], report["fingerprint"]);
}

#[test]
fn an_interrupted_synth_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("lite");
    let args = ["synth", "--preset=v2-lite", "--layers=3", &format!("--out={}", text(&out))].map(str::to_owned);
    let mut synth = Process::spawn(dir.path(), "synth", &binary(), &args).unwrap();
    let limit = Instant::now() + Duration::from_secs(30);
    while fs::read_dir(&out).is_ok_and(|files| files.count() == 0) || !out.exists() {
        assert!(Instant::now() < limit && synth.is_running(), "{}", synth.log());
        std::thread::sleep(Duration::from_millis(5));
    }
    synth.signal("INT").unwrap();
    let status = synth.wait_exit(Duration::from_secs(20)).unwrap();
    assert_eq!(status.code(), Some(1), "{}", synth.log());
    assert!(synth.log().contains("stopped before it was complete"), "{}", synth.log());
    assert!(!out.exists(), "{:?}", fs::read_dir(&out).map(|files| files.count()));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_is_a_cluster_of_its_own() {
    let serve = Serve::start(&["--shards=2"]).await.unwrap();
    let client = serve.client().await.unwrap();
    let request = GenerateRequest { ignore_eos: true, ..greedy(tokens(&[1, 2, 3]), 4) };
    client.generate(request).await.unwrap();
    let shown = printed(&["inspect", "--cluster", &serve.grpc]);
    for words in ["local, as http://127.0.0.1:", "expert-1", "0-3", "4-7", "coordinator reachable"] {
        assert!(shown.contains(words), "{words:?} in\n{shown}");
    }
    assert!(!shown.contains("warning") && shown.lines().all(|line| line.chars().count() <= 80), "{shown}");

    let view = json(&printed(&["inspect", "--cluster", serve.grpc.trim_start_matches("http://"), "--json"]));
    let rows: u64 = view["cells"].as_array().unwrap().iter().map(|cell| cell["rows"].as_u64().unwrap()).sum();
    // 3 prompt tokens and 3 decoded ones, through 5 layers, to 6 experts each.
    assert_eq!((view["cells"].as_array().unwrap().len(), rows), (8, 6 * 5 * 6));

    let output = conclave(&["inspect", "--cluster", &serve.http]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected the gRPC address of a router"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_in_a_cluster_are_warned_of() {
    let mut cluster = Cluster::start(ClusterSpec::even(2)).await.unwrap();
    let grpc = cluster.grpc.clone();
    let shown = printed(&["inspect", "--cluster", &grpc]);
    assert!(shown.contains("expert-1") && !shown.contains("warning"), "{shown}");

    let request = GenerateRequest { timeout_ms: 3000, ..greedy(tokens(&[1, 2, 3]), 2) };
    cluster.client().await.unwrap().generate(request.clone()).await.unwrap();
    cluster.experts[1].kill().unwrap();
    wait_for(&grpc, "warning: expert-1 has no record any more");
    cluster.client().await.unwrap().generate(request).await.unwrap_err();
    wait_for(&grpc, "warning: expert-1 is set aside");

    cluster.experts[0].signal("TERM").unwrap();
    wait_for(&grpc, "warning: cells 0, 1, 2, 3 have no ready replica");
    cluster.etcd.process().kill().unwrap();
    wait_for(&grpc, "warning: the coordinator (etcd) is not reachable");
}

fn wait_for(grpc: &str, warning: &str) {
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        let shown = printed(&["inspect", "--cluster", grpc]);
        if shown.contains(warning) {
            return;
        }
        assert!(Instant::now() < limit, "{warning:?} expected in\n{shown}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_without_the_router_and_ends_on_ctrl_c() {
    let dir = TempDir::new().unwrap();
    let mut serve = Serve::start(&[]).await.unwrap();
    let args = ["inspect", "--cluster", &serve.grpc, "--watch", "0.1", "--json"].map(str::to_owned);
    let mut watch = Process::spawn(dir.path(), "watch", &binary(), &args).unwrap();
    let lines = |watch: &Process, words: &str| watch.log().lines().filter(|line| line.contains(words)).count();
    wait_until(|| lines(&watch, "\"coordinator_reachable\":true") >= 2);
    serve.process.kill().unwrap();
    wait_until(|| lines(&watch, "\"error\":") >= 2);
    watch.signal("INT").unwrap();
    let status = watch.wait_exit(Duration::from_secs(5)).unwrap();
    assert!(status.success(), "{status}: {}", watch.log());
}

fn wait_until(holds: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < limit, "not within 20 seconds");
        std::thread::sleep(Duration::from_millis(50));
    }
}
