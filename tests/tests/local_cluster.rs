//! `make cluster`: the script that a person runs, from start to Ctrl-C.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use conclave_tests::{Client, Process, chat, free_port, greedy, root};

/// Processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let output = Command::new("ps").args(["-o", "pid=", "--ppid", &pid.to_string()]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn is_running(pid: u32) -> bool {
    Command::new("kill").args(["-0", &pid.to_string()]).stderr(Stdio::null()).status().unwrap().success()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_cluster_script_serves_and_cleans_up() {
    let dir = tempfile::TempDir::new().unwrap();
    let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let args: Vec<String> = vec![
        "-c".into(),
        format!("HTTP={http} GRPC={grpc} ETCD_PORT={} CONCLAVE={} exec deploy/local-cluster.sh", free_port(), binary()),
    ];
    let mut script = Process::spawn(dir.path(), "local-cluster", Path::new("sh"), &args).unwrap();
    script.wait_ready(&format!("http://{http}/readyz"), Duration::from_secs(60)).await.unwrap();
    script.wait_log("Ctrl-C stops it all", Duration::from_secs(30)).await.unwrap();

    let client = Client::connect(&format!("http://{grpc}")).await.unwrap();
    let answer = client.generate(greedy(chat("What is the capital of France?"), 30)).await.unwrap();
    assert!(answer.text.contains("Paris"), "{answer:?}");
    let view = client.cluster().await.unwrap();
    assert!(view.cells.iter().all(|cell| cell.instances.len() == 2), "{view:#?}");

    let started = children(script.pid());
    assert_eq!(started.iter().filter(|pid| is_running(**pid)).count(), 7, "etcd, router, attention and four experts");
    // As Ctrl-C does; a shell that was started in the background cannot catch SIGINT.
    script.signal("TERM").unwrap();
    script.wait_exit(Duration::from_secs(30)).unwrap();
    assert!(script.log().contains("stopping"), "{}", script.log());
    assert!(!started.iter().any(|pid| is_running(*pid)), "left behind: {started:?}");
}

fn binary() -> String {
    let path = conclave_tests::binary();
    path.strip_prefix(root()).unwrap_or(&path).display().to_string()
}
