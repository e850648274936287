//! Members that are started before their etcd.

use std::{path::Path, time::Duration};

use conclave_tests::{Etcd, Process, binary, demo_model, free_port};

const SOON: Duration = Duration::from_secs(20);

/// A member of a role at an etcd of this port.
fn member(dir: &Path, role: &str, etcd: u16, flags: &[&str]) -> Process {
    let mut args = vec![role.to_owned(), format!("--model={}", demo_model().display())];
    args.extend([format!("--etcd=http://127.0.0.1:{etcd}"), "--grpc=127.0.0.1:0".into()]);
    args.extend(flags.iter().map(ToString::to_string));
    Process::spawn(dir, role, &binary(), &args).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_them_wait_for_it() {
    let (dir, port) = (tempfile::TempDir::new().unwrap(), free_port());
    let here = ["--threads=1", "--admin=127.0.0.1:0"];
    let http = format!("127.0.0.1:{}", free_port());
    let members = [
        member(dir.path(), "expert", port, &here),
        member(dir.path(), "attention", port, &[&here[..], &["--dispatch=embedded"]].concat()),
        member(dir.path(), "router", port, &[&format!("--http={http}")]),
    ];
    let waiting = format!("waiting for etcd, for 57 s more at most etcd=\"http://127.0.0.1:{port}\" cause=");
    for member in &members {
        member.wait_log(&waiting, SOON).await.unwrap();
        assert!(member.log().contains("refused"), "{}", member.log());
    }
    let ask = async |path: &str| {
        let response = reqwest::get(format!("http://{http}{path}")).await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let expected = format!("starting: waiting for etcd at http://127.0.0.1:{port}");
    assert_eq!(ask("/readyz").await, (503, format!("{expected}\n")));
    let (status, body) = ask("/v1/models").await;
    assert!(status == 503 && body.contains(&expected), "{status} {body}");
    let _etcd = Etcd::start_on(port).await.unwrap();
    for (member, line) in members.iter().zip(["ready instance", "ready instance", "registered instance"]) {
        member.wait_log(line, SOON).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_waits_ends_when_it_is_told_to() {
    let dir = tempfile::TempDir::new().unwrap();
    for (role, signal) in [("expert", "TERM"), ("attention", "INT"), ("router", "TERM")] {
        let mut member =
            member(dir.path(), role, free_port(), if role == "router" { &["--http=127.0.0.1:0"] } else { &[] });
        member.wait_log("waiting for etcd", SOON).await.unwrap();
        member.signal(signal).unwrap();
        let status = member.wait_exit(Duration::from_secs(2)).unwrap();
        assert!(status.success(), "{role}: {status}\n{}", member.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn patience_ends_with_an_error() {
    let (dir, port) = (tempfile::TempDir::new().unwrap(), free_port());
    let mut member = member(dir.path(), "expert", port, &["--etcd-patience=0"]);
    assert_eq!(member.wait_exit(SOON).unwrap().code(), Some(1));
    let log = member.log();
    let error = log.lines().last().unwrap_or_default();
    assert!(error.starts_with(&format!("conclave: coordinator http://127.0.0.1:{port}: ")), "{log}");
    assert!(error.contains("refused") && error.contains("gave up after "), "{log}");
}
