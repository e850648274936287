//! Clients that go on where a killed server left them: what they print is what an unbroken run prints.

use std::process::{Output, Stdio};

use conclave_tests::{Serve, binary, demo_with_other_weights};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
};

/// Settings under which every token depends on the number and the kind of all before it.
const SETTINGS: [&str; 16] = [
    "--seed=7",
    "--temperature=1",
    "--top-p=0.98",
    "--min-p=0.01",
    "--repetition-penalty=1.05",
    "--presence-penalty=0.3",
    "--frequency-penalty=0.1",
    "--logit-bias=300:-2",
    "--stop-token=11",
    "--min-tokens=390",
    "--max-tokens=400",
    "--ignore-eos",
    "--chat",
    "--system=你是一个会讲故事的助手。",
    "--stop=no such text 你好",
    "讲一个小猫的故事。",
];

fn conclave(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn generate(url: &str, more: &[&str]) -> Command {
    let mut command = conclave(&["generate", "--url", url]);
    command.args(SETTINGS).args(more);
    command
}

/// Output of a run that nobody disturbs.
async fn undisturbed(mut command: Command) -> Vec<u8> {
    let Output { status, stdout, stderr } = command.output().await.unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success() && !stderr.contains("lost: "), "{status}\n{stderr}");
    stdout
}

/// What a run wrote, its server being killed and started again each time that so many more bytes have come.
async fn disturbed(serve: &mut Serve, mut command: Command, kills: &[usize]) -> (Vec<u8>, String) {
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut written = Vec::new();
    for bytes in kills {
        read_more(&mut stdout, &mut written, *bytes).await;
        serve.kill_and_start_again(&[]).await.unwrap();
    }
    stdout.read_to_end(&mut written).await.unwrap();
    (written, end(child).await)
}

async fn read_more(from: &mut (impl AsyncRead + Unpin), into: &mut Vec<u8>, bytes: usize) {
    let wanted = into.len() + bytes;
    while into.len() < wanted {
        assert!(from.read_buf(into).await.unwrap() > 0, "ended early: {}", String::from_utf8_lossy(into));
    }
}

/// What the child said besides; it must have ended well.
async fn end(child: Child) -> String {
    let Output { status, stderr, .. } = child.wait_with_output().await.unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert!(status.success(), "{status}\n{stderr}");
    stderr
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_has_the_same_bytes_over_two_killed_servers() {
    let mut serve = Serve::start(&[]).await.unwrap();
    let expected = undisturbed(generate(&serve.grpc, &[])).await;
    let command = generate(&serve.grpc, &[]);
    let (found, said) = disturbed(&mut serve, command, &[30, 400]).await;
    assert!(said.matches("connection lost: ").count() >= 2, "{said}");
    assert_eq!(String::from_utf8(expected).unwrap(), String::from_utf8(found).unwrap());
}

/// The events of each choice, without what may differ: ids of requests, and how much was in a cache.
fn events(lines: &[u8]) -> Vec<Vec<Value>> {
    let mut choices = vec![Vec::new(); 3];
    for line in String::from_utf8(lines.to_vec()).unwrap().lines() {
        let mut event: Value = serde_json::from_str(line).unwrap();
        if event["event"] == "started" {
            event["request_id"] = Value::Null;
        }
        if event["event"] == "finished" {
            event["usage"]["cached_tokens"] = Value::Null;
        }
        choices[event["choice"].as_u64().unwrap_or(0) as usize].push(event);
    }
    choices
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_has_the_same_tokens_and_logprobs() {
    let mut serve = Serve::start(&[]).await.unwrap();
    let flags = ["--json", "--choices=3", "--logprobs=2", "--prompt-logprobs=1"];
    let expected = undisturbed(generate(&serve.grpc, &flags)).await;
    let command = generate(&serve.grpc, &flags);
    let (found, said) = disturbed(&mut serve, command, &[20_000, 50_000]).await;
    assert!(said.matches("connection lost: ").count() >= 2, "{said}");
    let (expected, found) = (events(&expected), events(&found));
    for (choice, (expected, found)) in expected.iter().zip(&found).enumerate() {
        let last = expected.last().expect("events");
        assert!(last["exact"] == true && last["usage"]["completion_tokens"].as_u64() >= Some(390), "{last}");
        let first = expected.iter().zip(found).find(|(expected, found)| expected != found);
        assert_eq!((first, expected.len()), (None, found.len()), "choice {choice}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_goes_on_with_its_answer() {
    let mut serve = Serve::start(&["--device=reference", "--threads=1"]).await.unwrap();
    let url = serve.http.clone();
    let chat = || {
        let seed = ["--seed=3", "--temperature=0.9", "--frequency-penalty=0.2"];
        let mut command = conclave(&["chat", "--url", &url, "--once", "讲一个小狐狸的故事。"]);
        command.args(seed);
        command
    };
    let expected = undisturbed(chat()).await;
    let (found, said) = disturbed(&mut serve, chat(), &[30]).await;
    assert!(said.contains("going on after"), "{said}");
    assert_eq!(String::from_utf8(expected).unwrap(), String::from_utf8(found).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stays_away_is_a_clear_error() {
    let mut serve = Serve::start(&[]).await.unwrap();
    let mut child = generate(&serve.grpc, &["--retries=2"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    read_more(&mut stdout, &mut Vec::new(), 10).await;
    serve.process.kill().unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().await.unwrap();
    let said = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success());
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("conclave: 2 tries to go on after ") && last.contains("refused"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_does_not_go_on() {
    let mut serve = Serve::start(&[]).await.unwrap();
    let other = demo_with_other_weights();
    let mut child = generate(&serve.grpc, &[]).spawn().unwrap();
    read_more(child.stdout.as_mut().unwrap(), &mut Vec::new(), 10).await;
    serve.kill_and_start_again(&[&format!("--model={}", other.path().display())]).await.unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().await.unwrap();
    let said = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success() && said.contains("serves another model now"), "{status}\n{said}");
}
