//! Flags that make no sense, as a person meets the refusal: before weights are read or anybody is waited for.

use std::{path::Path, process::Command};

use conclave_tests::{binary, demo_model};

/// What `conclave` says with these flags, which has to refuse them with this exit code.
fn refused(code: i32, command: &str) -> String {
    let out = Command::new("timeout")
        .args(["20", &binary().display().to_string()])
        .args(command.split_whitespace())
        .args(["--model", &demo_model().display().to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{command}: {said}");
    assert!(!said.contains("panicked") && !said.contains("waiting for etcd"), "{command}: {said}");
    said
}

/// The last line, without what a warning may have said before.
fn error(command: &str) -> String {
    let said = refused(1, command);
    said.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_number_out_of_range_is_refused_with_the_range() {
    for (command, flag, range) in [
        ("serve --shards 0", "--shards <N>", "0 is not in 1..=65536"),
        ("bench --shards 0", "--shards <N>", "0 is not in 1..=65536"),
        ("serve --context 0", "--context <TOKENS>", "0 is not in 1..=4294967295"),
        ("serve --cache-mib 0", "--cache-mib <MIB>", "0 is not in 1..=1099511627776"),
        ("serve --max-running 0", "--max-running <N>", "0 is not in 1..=65536"),
        ("serve --prefill-chunk 0", "--prefill-chunk <TOKENS>", "0 is not in 1..=1048576"),
        ("serve --step-tokens 0", "--step-tokens <TOKENS>", "0 is not in 1..=1048576"),
        ("serve --max-sequences 0", "--max-sequences <N>", "0 is not in 1..=1048576"),
        ("serve --request-timeout 0", "--request-timeout <SECONDS>", "0 is not in 1..=31536000"),
        ("serve --model-name=", "--model-name <NAME>", "a value is required"),
        ("expert --etcd a:1 --queue-rows 0", "--queue-rows <ROWS>", "0 is not in 1..=16777216"),
        ("router --etcd a:1 --drain-timeout 31536001", "--drain-timeout <SECONDS>", "31536001 is not in 0..=31536000"),
    ] {
        let said = refused(2, command);
        assert!(said.contains(flag) && said.contains(range), "{command}: {said}");
    }
}

#[test]
fn what_contradicts_the_model_the_device_or_the_machine_is_refused_by_its_flag() {
    let ports = "--http 127.0.0.1:0 --grpc 127.0.0.1:0";
    let nobody = "--etcd 127.0.0.1:1 --grpc 127.0.0.1:0";
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml").display().to_string();
    let no_exact = "conclave: --no-exact: device reference-1 has no attention over expanded keys and values; leave --no-exact \
                    out, or compute with --device cpu or cuda";
    let context = "conclave: --context: found 4097, expected 1 to the model's 4096";
    for (command, expected) in [
        (format!("serve {ports} --no-exact --device reference"), no_exact.to_owned()),
        (format!("attention {nobody} --no-exact --device reference"), no_exact.to_owned()),
        (format!("serve {ports} --context 4097"), context.to_owned()),
        (format!("attention {nobody} --context 4097"), context.to_owned()),
        (format!("router {nobody} --http 127.0.0.1:0 --context 4097"), context.to_owned()),
        (format!("expert {nobody} --cells 9"), "conclave: placement: ".to_owned()),
        (
            format!("router {nobody} --http 127.0.0.1:0 --api-keys /nowhere"),
            "conclave: API keys /nowhere: No such file or directory (os error 2)".to_owned(),
        ),
        (
            "router --etcd 127.0.0.1:1 --http 127.0.0.1:0 --grpc 127.0.0.1:0 --dispatch 0.0.0.0:0".to_owned(),
            "conclave: --advertise: needed, since --dispatch listens on all interfaces (0.0.0.0:".to_owned(),
        ),
        (
            "serve --kernel-dir /nowhere".to_owned(),
            "conclave: --kernel-dir /nowhere: No such file or directory (os error 2); expected a directory".to_owned(),
        ),
        (
            format!("expert {nobody} --payload ipc --device reference"),
            "conclave: --payload ipc: device reference-1: shares no memory with other processes".to_owned(),
        ),
        (
            format!("attention {nobody} --payload ipc --device reference --dispatch embedded"),
            "conclave: --payload ipc: device reference-1: shares no memory with other processes".to_owned(),
        ),
        (
            format!("attention {nobody} --payload ipc"),
            "conclave: --payload ipc: layers go to a router, which has no device; needed is --dispatch embedded"
                .to_owned(),
        ),
        (
            format!("expert {nobody} --payload nccl --device reference"),
            "conclave: --payload nccl: device reference-1: has no links to devices of other processes".to_owned(),
        ),
        (
            format!("attention {nobody} --payload nccl --device reference --dispatch embedded"),
            "conclave: --payload nccl: device reference-1: has no links to devices of other processes".to_owned(),
        ),
        (
            format!("attention {nobody} --payload nccl"),
            "conclave: --payload nccl: layers go to a router, which has no device; needed is --dispatch embedded"
                .to_owned(),
        ),
        (
            format!("expert {nobody} --payload ipc --same-host off"),
            "conclave: --payload ipc: needs the sockets of members of one host, which --same-host off".to_owned(),
        ),
        (
            format!("expert {nobody} --kernel-dir {file}"),
            format!("conclave: --kernel-dir {file}: found a file, expected a directory of kernels"),
        ),
    ] {
        let found = error(&command);
        assert!(found.starts_with(&expected), "{command}:\n  found    {found}\n  expected {expected}");
    }
}
