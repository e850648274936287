//! `gpu.sh`: what runs on a GPU machine, in small on this machine's processor, so that nothing of it is new there.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Output},
};

use conclave_tests::{binary, root};
use serde_json::Value;

/// Name, state and all of each step of a run.
fn states(results: &Path) -> Vec<(String, String, Value)> {
    let text = fs::read_to_string(results.join("results.json")).unwrap();
    let whole: Value = serde_json::from_str(&text).unwrap();
    let text = |step: &Value, field: &str| step[field].as_str().unwrap_or_default().to_owned();
    let steps = whole["steps"].as_array().unwrap().iter();
    steps.map(|step| (text(step, "name"), text(step, "state"), step.clone())).collect()
}

fn run(package: &Path, more: &[&str]) -> Output {
    let script = root().join("deploy/gpu/run.py");
    let results = package.join("results");
    let mut command = Command::new("python3");
    command.arg("-B").arg(script).arg("--package").arg(package).arg("--results").arg(results).args(more);
    command.env_remove("MODEL").output().unwrap()
}

/// A folder with the binary in it, as it is carried; neither kernels nor tests.
fn package() -> tempfile::TempDir {
    let package = tempfile::TempDir::new().unwrap();
    symlink(binary(), package.path().join("conclave")).unwrap();
    package
}

#[test]
fn every_step_of_the_engine_runs_in_small_on_the_processor() {
    let package = package();
    let output = run(package.path(), &["--cpu", "--total", "400"]);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");

    let states = states(&package.path().join("results"));
    let state = |name: &str| {
        let found = states.iter().find(|(step, ..)| step == name);
        found.unwrap_or_else(|| panic!("no step {name}: {said}"))
    };
    let benches = ["bench, one process", "bench, one process, not exact", "bench, several processes"];
    let in_fp8 = ["make a checkpoint in FP8", "same bits, FP8", "bench, one process, FP8"];
    let others = ["make a checkpoint", "same bits", "ways of rows and sums"];
    for step in others.into_iter().chain(benches).chain(in_fp8) {
        assert_eq!(state(step).1, "passed", "{said}");
    }
    // Whoever reads results finds the figures in them, and who was compared with whom.
    let bench = &state("bench, one process").2["found"];
    assert!(bench["figures"].as_array().is_some_and(|figures| figures.len() > 5), "{bench}");
    let same = state("same bits").2["found"].as_object().unwrap();
    assert_eq!(same.len(), 5, "{same:?}");
    assert!(same["an expert killed"] == true && same["4 expert processes"] == true, "{same:?}");
    for step in ["test sm90", "kernels bits", "kernels card"] {
        let (_, state, whole) = state(step);
        assert_eq!(state, "skipped");
        assert!(whole["why"].as_str().unwrap().contains(&package.path().display().to_string()), "{whole}");
    }
}

#[test]
fn what_there_is_no_time_for_is_skipped_and_said() {
    let package = package();
    let output = run(package.path(), &["--cpu", "--total", "1"]);
    assert!(output.status.success(), "{output:?}");
    let states = states(&package.path().join("results"));
    assert!(states.iter().all(|(_, state, _)| state == "skipped"), "{states:?}");
    let (_, _, bits) = states.iter().find(|(name, ..)| name == "same bits").unwrap();
    assert!(bits["why"].as_str().unwrap().ends_with(" of 1 s left, up to 100 wanted"), "{bits}");
}

#[test]
fn a_machine_without_a_gpu_is_told_so() {
    let package = package();
    let folder = tempfile::TempDir::new().unwrap();
    let fake = folder.path().join("nvidia-smi");
    fs::write(&fake, "#!/bin/sh\necho no devices were found\nexit 6\n").unwrap();
    Command::new("chmod").arg("+x").arg(&fake).status().unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let script = root().join("deploy/gpu/run.py");
    let mut command = Command::new("python3");
    command.arg("-B").arg(script).arg("--package").arg(package.path()).env("PATH", path);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.trim(), "no GPU here: nvidia-smi: no devices were found");
}

#[test]
fn the_scripts_are_such() {
    for script in ["gpu.sh", "bench/run.sh", "local-cluster.sh"] {
        let output = Command::new("bash").arg("-n").arg(root().join("deploy").join(script)).output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
    }
    let usage = Command::new(root().join("deploy/gpu.sh")).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("gpu.sh run [RESULTS]"), "{usage:?}");
}
