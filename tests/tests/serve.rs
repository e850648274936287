//! `conclave serve` as a newcomer meets it.

use std::{path::Path, process::Command, time::Duration};

use conclave_proto::v1::{GenerateRequest, generate_event::Event};
use conclave_tests::{Process, Serve, binary, chat, free_port, greedy, tokens};

#[tokio::test(flavor = "multi_thread")]
async fn is_ready_soon_answers_the_printed_example_and_ends_on_ctrl_c() {
    let mut serve = Serve::start(&[]).await.unwrap();
    assert!(serve.ready_after < Duration::from_secs(5), "ready after {:?}", serve.ready_after);

    let log = serve.process.log();
    let line = log.lines().find(|line| line.trim_start().starts_with("curl ")).expect("a curl example in the output");
    let output = Command::new("sh").args(["-c", line.trim()]).output().unwrap();
    let body: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = body["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    assert!(text.contains("Paris"), "{line}\n{body}");

    serve.process.signal("INT").unwrap();
    let status = serve.process.wait_exit(Duration::from_secs(2)).unwrap();
    assert!(status.success(), "{status}\n{}", serve.process.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_during_a_stream_ends_within_two_seconds() {
    let mut serve = Serve::start(&[]).await.unwrap();
    let mut request = greedy(chat("Tell me a story about a little fox."), 3000);
    request.ignore_eos = true;
    let mut stream = serve.client().await.unwrap().stream(request).await.unwrap();
    for _ in 0..5 {
        stream.message().await.unwrap().expect("an event");
    }
    serve.process.signal("INT").unwrap();
    let status = serve.process.wait_exit(Duration::from_secs(2)).unwrap();
    assert!(status.success(), "{status}\n{}", serve.process.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn goes_on_when_nobody_reads_its_log_any_more() {
    let (dir, http) = (tempfile::TempDir::new().unwrap(), format!("127.0.0.1:{}", free_port()));
    let serve =
        format!("exec {} serve --log=debug --http={http} --grpc=127.0.0.1:0 > >(true) 2>&1", binary().display());
    let mut serve = Process::spawn(dir.path(), "serve", Path::new("bash"), &["-c".into(), serve]).unwrap();
    serve.wait_ready(&format!("http://{http}/readyz"), Duration::from_secs(60)).await.unwrap();
    let body = r#"{"prompt":"Once upon a time","max_tokens":3}"#;
    let request = reqwest::Client::new().post(format!("http://{http}/v1/completions"));
    let answer = request.header("content-type", "application/json").body(body).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    serve.signal("INT").unwrap();
    assert!(serve.wait_exit(Duration::from_secs(3)).unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_in_chinese() {
    let serve = Serve::start(&[]).await.unwrap();
    let answer = serve.client().await.unwrap().generate(greedy(chat("讲一个小猫的故事。"), 60)).await.unwrap();
    assert!(answer.text.contains('猫'), "{answer:?}");
    assert!(!answer.text.contains('\u{fffd}'), "a split character: {answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn takes_a_long_context_and_refuses_one_past_the_limit() {
    let serve = Serve::start(&[]).await.unwrap();
    let client = serve.client().await.unwrap();
    let ids: Vec<u32> = (0..4000u32).map(|i| 300 + (i * 7919) % 3000).collect();
    let answer = client.generate(greedy(tokens(&ids), 8)).await.unwrap();
    assert!(!answer.tokens.is_empty(), "{answer:?}");

    let error = client.stream(greedy(tokens(&ids), 200)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    for number in ["4096", "4000", "200"] {
        assert!(error.message().contains(number), "{number} in {error}");
    }
}

/// Tokens of the prompt that were read from the cache, and the answer's tokens.
async fn cached(serve: &Serve, request: GenerateRequest) -> (u32, Vec<(u32, Option<u32>)>) {
    let mut stream = serve.client().await.unwrap().stream(request).await.unwrap();
    let mut answer = Vec::new();
    loop {
        match stream.message().await.unwrap().expect("a finished event").event.unwrap() {
            Event::Delta(delta) => answer.extend(delta.tokens.iter().map(|t| (t.token, t.logprob.map(f32::to_bits)))),
            Event::Finished(finished) => return (finished.usage.unwrap().cached_tokens, answer),
            Event::Started(_) | Event::Prompt(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_seen_before_is_read_from_the_cache() {
    let serve = Serve::start(&[]).await.unwrap();
    let prompt: Vec<u32> = (0..2000u32).map(|i| 300 + (i * 6007) % 3500).collect();
    let first = cached(&serve, greedy(tokens(&prompt), 8)).await;
    let second = cached(&serve, greedy(tokens(&prompt), 8)).await;
    assert_eq!((first.0, second.0), (0, 1984), "all but the block of the last position");
    assert_eq!(first.1, second.1);

    let metrics = reqwest::get(format!("{}/metrics", serve.http)).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("conclave_attention_cached_prompt_tokens_total 1984\n"), "{metrics}");
}
