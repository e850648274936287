//! Real clients: the openai SDK, grpcio made from the .proto files, health and reflection.

use std::process::Command;

use conclave_tests::{Cluster, ClusterSpec, Serve, root};

/// Runs a client script in the virtual environment that `make deps` makes.
fn run(script: &str, args: &[&str]) {
    let python = root().join(".venv/bin/python");
    if !python.exists() && std::env::var_os("CONCLAVE_REQUIRE_CLIENTS").is_none() {
        println!("SKIP {script}: {} is not there; `make deps` makes it", python.display());
        return;
    }
    let output = Command::new(&python)
        .arg(root().join("tests/clients").join(script))
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("run {}: {error}", python.display()));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} failed\n{out}\n{err}");
    print!("{out}");
}

fn proto_dir() -> String {
    root().join("proto").display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_one_process() {
    let serve = Serve::start(&[]).await.unwrap();
    run("openai_client.py", &[&format!("{}/v1", serve.http)]);
    run("grpc_client.py", &[serve.grpc.trim_start_matches("http://"), &proto_dir()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_cluster() {
    let cluster = Cluster::start(ClusterSpec::even(2)).await.unwrap();
    run("openai_client.py", &[&format!("{}/v1", cluster.http)]);
    run("grpc_client.py", &[cluster.grpc.trim_start_matches("http://"), &proto_dir()]);
}
