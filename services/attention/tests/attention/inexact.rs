//! A service that may give other bits for the sake of speed.

use conclave_proto::v1::SequenceRequest;
use futures::StreamExt;

use crate::common::{MOE, cpu, prompt, reference, request, start_on};
use conclave_attention::AttentionService;

fn scored() -> SequenceRequest {
    SequenceRequest { prompt_logprobs: Some(0), ..request(prompt(3, 400)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_are_computed_otherwise_and_come_out_alike() {
    let exact = start_on(cpu(), &MOE, |_| {}).answer(scored()).await;
    let service = start_on(cpu(), &MOE, |config| config.exact = false);
    let inexact = service.answer(scored()).await;
    assert_eq!(exact.scores.len(), inexact.scores.len());
    let logprob = |score: &conclave_proto::v1::ScoredToken| f64::from(score.logprob.unwrap_or(0.0));
    let difference = |(a, b)| (logprob(a) - logprob(b)).abs();
    let differences: Vec<f64> = exact.scores.iter().zip(&inexact.scores).map(difference).collect();
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    assert!(mean > 0.0 && mean < 0.02, "mean difference of logprobs {mean}");

    let short = |seed| request(prompt(seed, 100));
    let exact = start_on(cpu(), &MOE, |_| {}).answer(short(5)).await;
    assert_eq!(service.answer(short(5)).await.tokens, exact.tokens, "short prompts are absorbed");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_says_so() {
    for exact in [true, false] {
        let service = start_on(cpu(), &MOE, |config| config.exact = exact);
        let events: Vec<_> = service.service.generate(scored()).unwrap().collect().await;
        assert!(events.len() > 10 && events.iter().all(|event| event.as_ref().unwrap().inexact != exact));
    }
}

#[test]
fn a_device_that_cannot_is_refused() {
    let checkpoint = crate::common::checkpoint::open(&MOE).1;
    let config = conclave_attention::AttentionConfig { exact: false, ..crate::common::config() };
    let experts = crate::common::Experts::new();
    let refused = AttentionService::start(config, reference(), checkpoint, experts, &prometheus::Registry::new());
    let Err(error) = refused else { panic!("accepted") };
    let message = error.to_string();
    let expected =
        "exact: found false, which needs attention over expanded keys and values; device reference-1 has none";
    assert_eq!(message, expected);
}
