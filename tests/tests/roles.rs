//! A router's two roles in processes of their own.

use std::time::Duration;

use conclave_tests::{Client, Etcd, Process, binary, chat, demo_model, free_port, greedy};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn front_and_dispatch_serve_and_are_ready_apart_from_each_other() {
    let (dir, etcd) = (tempfile::TempDir::new().unwrap(), Etcd::start().await.unwrap());
    let start = |name: &str, args: &str| {
        let common = [format!("--model={}", demo_model().display()), format!("--etcd={}", etcd.url)];
        let args: Vec<String> = args.split_whitespace().map(str::to_owned).chain(common).collect();
        Process::spawn(dir.path(), name, &binary(), &args).unwrap()
    };
    let (http, grpc, dispatch) = (free_port(), free_port(), free_port());
    let mut dispatching = start("dispatch", &format!("router --role dispatch --http 127.0.0.1:{dispatch}"));
    let ready = format!("http://127.0.0.1:{dispatch}/readyz");
    dispatching.wait_ready(&ready, SOON).await.unwrap();

    let _expert = start("expert", "expert --threads 1");
    let _attention = start("attention", "attention --threads 1");
    let mut front = start("front", &format!("router --role front --http 127.0.0.1:{http} --grpc 127.0.0.1:{grpc}"));
    front.wait_ready(&format!("http://127.0.0.1:{http}/readyz"), SOON).await.unwrap();
    let client = Client::connect(&format!("http://127.0.0.1:{grpc}")).await.unwrap();
    let answer = client.generate(greedy(chat("What is the capital of France?"), 30)).await.unwrap();
    assert!(answer.text.contains("Paris"), "{answer:?}");
    let metrics = reqwest::get(format!("http://127.0.0.1:{dispatch}/metrics")).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("conclave_dispatch_calls_total{outcome=\"ok\"}"), "{metrics}");
}
