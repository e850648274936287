//! Answers that a client goes on with after its stream broke.

mod support;

use conclave_proto::v1::{
    FinishReason, Finished, GenerateRequest, Prompt, Resume, SamplingOptions, TokenIds, generate_event::Event,
    inference_client::InferenceClient, prompt,
};
use futures::TryStreamExt;
use serde_json::json;
use support::{ByteCodec, Router, Script, Setup};
use tonic::Status;

const SAID: &str = "né 你好, bye END more";

fn request(resume: Vec<Resume>) -> GenerateRequest {
    let prompt = Prompt { prompt: Some(prompt::Prompt::Tokens(TokenIds { ids: vec![5, 6] })) };
    let sampling = SamplingOptions { seed: Some(7), min_tokens: Some(3), ..SamplingOptions::default() };
    GenerateRequest {
        prompt: Some(prompt),
        sampling: Some(sampling),
        choices: 2,
        max_tokens: Some(40),
        stop: vec!["END".to_owned()],
        resume,
        ..GenerateRequest::default()
    }
}

fn of(choice: u32, tokens: &[u32]) -> Resume {
    Resume { choice, tokens: tokens.to_vec() }
}

async fn events(router: &Router, request: GenerateRequest) -> Result<Vec<(u32, Event)>, Status> {
    let mut client = InferenceClient::connect(router.grpc.clone()).await.expect("a server");
    let events = client.generate(request).await?.into_inner();
    events.map_ok(|event| (event.choice, event.event.expect("an event"))).try_collect().await
}

/// Tokens, text and end of one choice.
fn gather(events: &[(u32, Event)], choice: u32) -> (Vec<u32>, String, Option<Finished>) {
    let (mut tokens, mut text, mut end) = (Vec::new(), String::new(), None);
    for (_, event) in events.iter().filter(|(of, _)| *of == choice) {
        match event {
            Event::Delta(delta) => {
                tokens.extend(delta.tokens.iter().map(|token| token.token));
                text.push_str(&delta.text);
            }
            Event::Finished(finished) => end = Some(finished.clone()),
            Event::Started(_) | Event::Prompt(_) => {}
        }
    }
    (tokens, text, end)
}

#[tokio::test]
async fn an_answer_cut_anywhere_comes_out_whole() {
    let router = Setup::with(Script::says(SAID)).start().await;
    let whole = events(&router, request(Vec::new())).await.expect("taken");
    let (all, text, end) = gather(&whole, 1);
    assert_eq!((text.as_str(), end.as_ref().and_then(|end| end.stop.as_deref())), ("né 你好, bye ", Some("END")));
    for cut in 0..all.len() {
        let events = events(&router, request(vec![of(1, &all[..cut])])).await.expect("taken");
        assert!(matches!(&events[0], (0, Event::Started(started)) if started.prompt_tokens == [5, 6]));
        assert!(events[1..].iter().all(|(choice, _)| *choice == 1), "only the choice that is resumed: {events:?}");
        // What an unbroken stream had sent with these tokens.
        let deltas = whole.iter().filter(|(choice, _)| *choice == 1).take(cut);
        let had: String =
            deltas.map(|(_, event)| if let Event::Delta(delta) = event { &*delta.text } else { "" }).collect();
        let (tokens, rest, found) = gather(&events, 1);
        assert_eq!((tokens, had + &rest, found), (all[cut..].to_vec(), text.clone(), end.clone()), "cut after {cut}");
    }
    let sent = router.replicas.get("a").requests();
    let (first, last) = (&sent[1], &sent[sent.len() - 1]);
    assert_eq!(last.tokens, [&[5, 6], &all[..all.len() - 1]].concat());
    assert_eq!((last.prompt_len, last.choice, last.max_tokens), (first.prompt_len, 1, first.max_tokens));
    assert_eq!(last.sampling, first.sampling);
}

#[tokio::test]
async fn an_answer_that_had_ended_ends_again() {
    let router = Setup::with(Script::says(SAID)).start().await;
    let all = gather(&events(&router, request(Vec::new())).await.expect("taken"), 0).0;
    let asked = router.replicas.get("a").requests().len();
    let again = events(&router, request(vec![of(0, &all)])).await.expect("taken");
    let (tokens, text, end) = gather(&again, 0);
    let end = end.expect("an end");
    assert_eq!(
        (tokens.len(), text.as_str(), end.stop.as_deref(), end.reason()),
        (0, "", Some("END"), FinishReason::Stop)
    );
    assert_eq!(end.usage.expect("usage").completion_tokens as usize, all.len());
    assert_eq!(router.replicas.get("a").requests().len(), asked, "nothing is left to generate");
    assert_eq!(router.metric("conclave_active_sequences"), 0.0);
}

#[tokio::test]
async fn what_no_answer_can_have_been_is_refused() {
    let router = Setup::with(Script::says(SAID)).start().await;
    let refused = async |resume: Resume| events(&router, request(vec![resume])).await.expect_err("refused");
    let error = refused(of(0, &ByteCodec::ids("an END and more"))).await;
    let early = "resume: found the stop string \"END\" after 6 of 15 tokens, expected none before the last";
    assert_eq!(error.message(), early);
    let error = refused(of(0, &[65; 41])).await;
    assert_eq!(error.message(), "resume: found 41 tokens of choice 0, expected at most max_tokens, which is 40");
    assert!(router.replicas.get("a").requests().is_empty());
}

#[tokio::test]
async fn prompt_scores_come_until_a_token_has_come() {
    let router = Setup::with(Script::says("hi")).start().await;
    let request = |resume| GenerateRequest { prompt_logprobs: Some(0), ..request(resume) };
    let scores = |events: &[(u32, Event)]| {
        let scored = events.iter().filter_map(|(choice, event)| matches!(event, Event::Prompt(_)).then_some(*choice));
        scored.collect::<Vec<_>>()
    };
    let resume = vec![of(0, &ByteCodec::ids("h")), of(1, &[])];
    assert_eq!(scores(&events(&router, request(resume)).await.expect("taken")), [1]);
}

#[tokio::test]
async fn a_chat_is_resumed_over_http() {
    let router = Setup::with(Script::says("né END")).start().await;
    let post = async |more: serde_json::Value| {
        let mut body = json!({
            "messages": [{"role": "user", "content": "hi"}], "seed": 7, "stop": "END",
            "stream": true, "return_token_ids": true,
        });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        router.post("/v1/chat/completions", &body.to_string()).await.chunks()
    };
    // The first two tokens: `n` and one half of `é`.
    let ids = ByteCodec::ids("né");
    let chunks = post(json!({"resume": [{"index": 0, "token_ids": &ids[..2]}]})).await;
    let whole = post(json!({})).await;
    assert_eq!(chunks[0]["choices"][0]["prompt_token_ids"], whole[0]["choices"][0]["prompt_token_ids"]);
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "é ");
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["stop_reason"], "END");
    assert_eq!(chunks[1]["choices"][0]["token_ids"], json!([ids[2]]));
}
