//! The client commands as scripts use them.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use conclave_tests::{Serve, binary, free_port};
use serde_json::Value;

/// Runs `conclave` with some input; what it wrote, what it said besides, and whether it ended well.
fn conclave(args: &[&str], input: &str) -> (String, String, bool) {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that was refused its flags does not read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_answers_a_message_a_line() {
    let serve = Serve::start(&[]).await.unwrap();
    let script = "/temperature 0\nWhat is the capital of France?\n\n你好！\n/exit\nnever asked\n";
    let (answers, said, well) = conclave(&["chat", "--url", &serve.http], script);
    assert!(well && said.is_empty(), "{said}");
    let lines: Vec<&str> = answers.lines().collect();
    assert_eq!(lines.len(), 2, "{answers}");
    assert!(lines[0].contains("Paris") && lines[1].contains("你好"), "{answers}");
    assert!(!answers.contains('\x1b') && !answers.contains('\u{fffd}'), "{answers:?}");

    let (answer, _, well) =
        conclave(&["chat", "--url", &serve.http, "--once", "What is 3 + 4?", "--temperature=0"], "");
    assert!(well && answer.contains('7') && answer.lines().count() == 1, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_in_a_chat_is_said() {
    let serve = Serve::start(&[]).await.unwrap();
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    for (args, input, reason) in [
        (&["--url", &nowhere][..], "hi\n", "no answer from "),
        (&["--url", &serve.http, "--model", "gpt"], "hi\n", "model \"gpt\" is not served here, expected "),
        (&["--url", &format!("{}/v2", serve.http)], "hi\n", "there is no GET /v2/models (HTTP 404)"),
        (&["--url", "https://127.0.0.1/v1"], "hi\n", "only plain HTTP is spoken"),
        (&["--url", &serve.http, "--temperature=9"], "hi\n", "temperature: found 9, expected 0 to 2 (HTTP 400)"),
        (&["--url", &serve.http], "/sed 7\n", "there is no command /sed"),
    ] {
        let (answers, said, well) = conclave(&[&["chat"], args].concat(), input);
        assert!(!well && answers.is_empty() && said.contains(reason), "{args:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_something_else_is_no_router() {
    let serve = Serve::start(&[]).await.unwrap();
    for command in [&["generate", "hi", "--url", &serve.http][..], &["inspect", "--cluster", &serve.http]] {
        let (answer, said, well) = conclave(command, "");
        let expected = "expected the gRPC address of a router (its --grpc, 127.0.0.1:50051 by default)";
        assert!(!well && answer.is_empty() && said.contains(&serve.http) && said.contains(expected), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_clients_give_their_key() {
    let folder = tempfile::TempDir::new().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "sk-test\n").unwrap();
    let serve = Serve::start(&[&format!("--api-keys={}", keys.display())]).await.unwrap();
    let (chat, generate) =
        (["chat", "--once=hi", "--url", &serve.http], ["generate", "hi", "--max-tokens=3", "--url", &serve.grpc]);
    for command in [&chat[..], &generate] {
        assert!(conclave(&[command, &["--api-key=sk-test"]].concat(), "").2);
        let (_, said, well) = conclave(&[command, &["--api-key=sk-other"]].concat(), "");
        assert!(!well && said.contains("the API key is not known here") && said.contains("--api-key"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_takes_every_kind_of_prompt() {
    let serve = Serve::start(&[]).await.unwrap();
    let run = |args: &[&str], input: &str| {
        let (text, said, well) = conclave(
            &[&["generate", "--url", &serve.grpc, "--temperature=0", "--max-tokens=12"], args].concat(),
            input,
        );
        assert!(well, "{args:?}: {said}");
        text
    };
    assert!(run(&["--chat", "What is the capital of France?"], "").contains("Paris"));
    let text = run(&["Once upon a time"], "");
    assert_eq!(run(&["-"], "Once upon a time\n"), text);
    let started: Value =
        serde_json::from_str(run(&["Once upon a time", "--json"], "").lines().next().unwrap()).unwrap();
    let ids: Vec<String> = started["prompt_tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(run(&["--tokens", &ids.join(",")], ""), text);
    let both = run(&["Once upon a time", "--choices=2"], "");
    assert_eq!(both, format!("--- choice 0 ---\n{text}--- choice 1 ---\n{text}"));
}
