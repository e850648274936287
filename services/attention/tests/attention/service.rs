//! How requests end: limits, stop tokens, deadlines, cancellation, failing experts, draining.

use std::time::{Duration, Instant};

use crate::common::{
    Behaviour, Experts, Fixture, MOE, checkpoint, collect, config, prompt, reference, request, sampled, start,
    start_shape,
};
use conclave_attention::sampler::TokenMask;
use conclave_attention::scheduler::MicroBatches;
use conclave_attention::{AttentionConfig, AttentionError, AttentionService, CacheSize};
use conclave_proto::v1::{DispatchErrorKind, FinishReason, Sampling, SequenceRequest, token_event::Event};
use conclave_serve::ErrorKind;
use futures::StreamExt;
use prometheus::Registry;

fn forever(tokens: Vec<u32>) -> SequenceRequest {
    SequenceRequest { max_tokens: 100_000, ..request(tokens) }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_end_a_sequence_with_length() {
    let fixture = start(|config| config.context_limit = Some(40));
    let answer = fixture.answer(request(prompt(1, 20))).await;
    let finished = answer.finished.unwrap();
    assert_eq!((finished.reason(), finished.prompt_tokens, finished.stop_token), (FinishReason::Length, 20, None));
    assert_eq!(answer.tokens.iter().map(|token| token.position).collect::<Vec<_>>(), (20..30).collect::<Vec<_>>());
    let answer = fixture.answer(forever(prompt(1, 30))).await;
    assert_eq!((answer.tokens.len(), answer.finished.unwrap().reason()), (10, FinishReason::Length));
    let error = fixture.service.generate(request(prompt(1, 41))).unwrap_err();
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert!(error.message.contains("41") && error.message.contains("40"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_tokens_end_a_sequence_and_are_not_part_of_it() {
    let fixture = start(|_| {});
    let whole = fixture.answer(sampled(prompt(3, 9), 5)).await;
    let stop = whole.tokens[6].token;
    let first = whole.ids().iter().position(|id| *id == stop).unwrap();
    let stopping = SequenceRequest { stop_token_ids: vec![stop], ..sampled(prompt(3, 9), 5) };
    let answer = fixture.answer(stopping).await;
    assert!(first >= 2, "past min_tokens");
    assert_eq!(answer.tokens, whole.tokens[..first]);
    let finished = answer.finished.unwrap();
    assert_eq!((finished.reason(), finished.stop_token), (FinishReason::Stop, Some(stop)));
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_tokens_wait_for_min_tokens_and_masked_ids_never_come() {
    let fixture = start(|config| config.allowed_tokens = Some(TokenMask::new(checkpoint::VOCAB, |id| id % 2 == 1)));
    let stop: Vec<u32> = (0..250).collect();
    let sampling = Sampling { min_tokens: 8, temperature: 3.0, ..request(vec![1]).sampling.unwrap() };
    for seed in 0..10 {
        let sampling = Sampling { seed, ..sampling.clone() };
        let request = SequenceRequest { stop_token_ids: stop.clone(), sampling: Some(sampling), ..forever(vec![1, 2]) };
        let answer = fixture.answer(request).await;
        assert!(answer.tokens.len() >= 8, "{} tokens", answer.tokens.len());
        assert!(answer.tokens[..8].iter().all(|token| token.token >= 250));
        assert!(answer.tokens.iter().all(|token| token.token % 2 == 1));
        assert_eq!(answer.finished.unwrap().reason(), FinishReason::Stop);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scoring_one_token_has_nothing_to_score() {
    let fixture = start(|_| {});
    let answer = fixture.answer(SequenceRequest { max_tokens: 0, prompt_logprobs: Some(0), ..request(vec![5]) }).await;
    assert!(answer.scores.is_empty() && answer.finished.is_some());
    assert_eq!(fixture.experts.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dense_model_never_asks_for_routed_experts() {
    let fixture = start_shape(&checkpoint::DENSE_ONLY, |_| {});
    assert_eq!(fixture.answer(request(prompt(1, 30))).await.tokens.len(), 10);
    assert_eq!(fixture.experts.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_stream_frees_its_blocks() {
    let fixture = start(|_| {});
    let mut stream = Box::pin(fixture.service.generate(forever(prompt(1, 100))).unwrap());
    assert!(matches!(stream.next().await, Some(Ok(event)) if matches!(event.event, Some(Event::Token(_)))));
    let waiting = fixture.service.generate(forever(prompt(1, 100))).unwrap();
    drop((stream, waiting));
    fixture.until("idle", Fixture::idle).await;
    let calls = fixture.experts.calls();
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(fixture.experts.calls(), calls, "nothing is computed for nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_request_wherever_it_is() {
    let fixture = start(|config| config.max_running = 1);
    fixture.experts.set(Behaviour::Slow(Duration::from_millis(5)));
    let start = Instant::now();
    let late = SequenceRequest { budget_ms: 300, ..forever(prompt(1, 10)) };
    let waiting = SequenceRequest { budget_ms: 100, ..forever(prompt(2, 10)) };
    let answers = fixture.answers(&[late, waiting]).await;
    for (answer, budget) in answers.iter().zip(["300 ms", "100 ms"]) {
        let error = answer.error.as_ref().expect("ends with an error");
        assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
        assert!(error.message.contains(budget), "{error}");
    }
    assert!(!answers[0].tokens.is_empty() && answers[1].tokens.is_empty());
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert!(*fixture.experts.budget_us.lock().unwrap() <= 300_000, "the experts know the deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_experts_end_only_what_is_late() {
    let fixture = start(|_| {});
    let patient = sampled(prompt(1, 70), 3);
    let expected = fixture.answer(patient.clone()).await;
    fixture.experts.set(Behaviour::Hang);
    let hurried = fixture.service.generate(SequenceRequest { budget_ms: 150, ..request(prompt(2, 20)) }).unwrap();
    let patient = fixture.service.generate(patient).unwrap();
    let late = collect(hurried).await;
    assert_eq!(late.error.unwrap().kind, ErrorKind::DeadlineExceeded);
    fixture.experts.set(Behaviour::Answer);
    assert!(collect(patient).await == expected);
    assert!(fixture.metric("conclave_attention_cut_steps_total") >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_holds_for_what_waits_behind_a_step_that_hangs() {
    let fixture = start(|_| {});
    fixture.experts.set(Behaviour::Hang);
    let _stuck = fixture.service.generate(request(prompt(1, 5))).unwrap();
    fixture.until("the layer", |fixture| fixture.experts.calls() == 1).await;
    let answer = fixture.answer(SequenceRequest { budget_ms: 50, ..request(prompt(2, 5)) }).await;
    assert_eq!(answer.error.unwrap().kind, ErrorKind::DeadlineExceeded);
    assert_eq!(fixture.experts.calls(), 1, "the step still hangs");
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_come_back_lose_nothing() {
    let requests = [sampled(prompt(1, 70), 3), request(prompt(2, 5))];
    let expected = start(|_| {}).answers(&requests).await;
    for micro_batches in [MicroBatches::One, MicroBatches::Two] {
        let fixture = start(|config| config.micro_batches = micro_batches);
        for kind in [ErrorKind::Unavailable, ErrorKind::DeadlineExceeded, ErrorKind::ResourceExhausted] {
            fixture.experts.set(Behaviour::Fail(3, kind));
            assert!(fixture.answers(&requests).await == expected, "{kind:?}, micro-batches: {micro_batches:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_micro_batches_both_are_with_the_experts_at_once() {
    let request = sampled(prompt(1, 70), 3);
    for (micro_batches, at_once) in [(MicroBatches::One, 1), (MicroBatches::Two, 2)] {
        let fixture = start(|config| config.micro_batches = micro_batches);
        fixture.experts.set(Behaviour::Slow(Duration::from_millis(20)));
        assert!(fixture.answer(request.clone()).await.finished.is_some());
        assert_eq!(fixture.experts.most_at_once(), at_once, "{micro_batches:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_stay_away_end_in_one_clear_error() {
    let fixture = start(|config| config.moe_retry_limit = Duration::from_millis(100));
    fixture.experts.set(Behaviour::Refuse(DispatchErrorKind::NoReplica));
    let error = fixture.answer(request(prompt(1, 5))).await.error.unwrap();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("told to refuse") && error.message.contains("unreachable"), "{error}");
    assert!(fixture.experts.calls() > 2, "tried again");
    fixture.experts.set(Behaviour::Hang);
    assert_eq!(fixture.answer(request(prompt(1, 5))).await.error.unwrap().kind, ErrorKind::Unavailable);
    fixture.experts.set(Behaviour::Refuse(DispatchErrorKind::Invalid));
    let calls = fixture.experts.calls();
    assert_eq!(fixture.answer(request(prompt(1, 5))).await.error.unwrap().kind, ErrorKind::Internal);
    assert_eq!(fixture.experts.calls(), calls + 1, "not tried again");
    fixture.experts.set(Behaviour::Answer);
    assert!(fixture.answer(request(prompt(1, 5))).await.finished.is_some(), "and it goes on");
    fixture.until("idle", Fixture::idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_row_ends_its_own_sequence_only() {
    let fixture = start(|_| {});
    let innocent = request(prompt(2, 40));
    let expected = fixture.answer(innocent.clone()).await;
    let before = fixture.experts.calls();
    // Both arrive while a slow step is on its way, so that they are computed together.
    fixture.experts.set(Behaviour::Slow(Duration::from_millis(100)));
    let first = fixture.service.generate(SequenceRequest { max_tokens: 1, ..request(prompt(9, 3)) }).unwrap();
    fixture.until("a step", |fixture| fixture.experts.calls() > before).await;
    let streams = [request(prompt(1, 40)), innocent].map(|request| fixture.service.generate(request).unwrap());
    fixture.until("its last layer", |fixture| fixture.experts.calls() == before + 2).await;
    fixture.experts.set(Behaviour::BreakFirstRow);
    collect(first).await;
    let [broken, whole] = streams.map(collect);
    let error = broken.await.error.unwrap();
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("not finite"), "{error}");
    assert!(whole.await == expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded() {
    let fixture = start(|config| (config.max_running, config.max_waiting) = (1, 2));
    fixture.experts.set(Behaviour::Hang);
    let open: Vec<_> = (0..3).map(|i| fixture.service.generate(request(prompt(i, 5))).unwrap()).collect();
    let refused = fixture.service.generate(request(prompt(1, 5))).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::ResourceExhausted);
    fixture.until("running", |fixture| fixture.experts.calls() > 0).await;
    assert_eq!(fixture.service.status().waiting + fixture.service.status().running, 3);
    drop(open);
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_finishes_what_runs_and_refuses_what_comes() {
    let fixture = start(|_| {});
    fixture.experts.set(Behaviour::Slow(Duration::from_millis(2)));
    let stream = fixture.service.generate(request(prompt(1, 5))).unwrap();
    let (answer, ()) = tokio::join!(collect(stream), fixture.service.drain());
    assert_eq!(answer.tokens.len(), 10);
    assert_eq!(fixture.service.status().state, "leaving");
    assert_eq!(fixture.service.generate(request(prompt(1, 5))).unwrap_err().kind, ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_contradict_the_model_are_refused() {
    let (_dir, checkpoint) = checkpoint::open(&MOE);
    let refused = |change: fn(&mut AttentionConfig)| -> String {
        let mut config = config();
        change(&mut config);
        let experts = Experts::new();
        let started = AttentionService::start(config, reference(), checkpoint.clone(), experts, &Registry::new());
        started.map(|_| ()).map_err(|error: AttentionError| error.to_string()).unwrap_err()
    };
    let context = refused(|config| config.context_limit = Some(2000));
    assert_eq!(context, "context_limit: found 2000, expected 1 to the model's 1024");
    let cache = refused(|config| (config.context_limit, config.cache) = (Some(200), CacheSize::Blocks(3)));
    assert_eq!(cache, "context_limit: found 200, expected at most the 192 positions that the cache holds");
    assert!(refused(|config| config.cache = CacheSize::Bytes(10)).starts_with("cache: found 10 bytes, expected"));
    assert!(refused(|config| config.max_running = 0).starts_with("max_running"));
}

#[tokio::test(flavor = "multi_thread")]
async fn loading_reports_every_byte_of_the_trunk() {
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let sink = seen.clone();
    let progress = conclave_model::Progress::new(move |done, total| sink.lock().unwrap().push((done, total)));
    start(|config| config.progress = progress);
    let seen = seen.lock().unwrap();
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 == pair[1].1));
    let (done, total) = *seen.last().unwrap();
    assert_eq!(done, total);
}
