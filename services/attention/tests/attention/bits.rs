//! Tokens and logprobs depend on the request alone.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{
    Answer, Experts, Fixture, MOE, checkpoint, cpu, prompt, reference, request, sampled, start, start_on, trunk,
};
use conclave_attention::forward::{Cut, MoeCaller, logits};
use conclave_attention::{AttentionConfig, CacheSize, scheduler::MicroBatches};
use conclave_kernels::Device;
use conclave_model::Checkpoint;
use conclave_proto::v1::SequenceRequest;

/// All-position logits, as bits.
async fn all_logits(
    device: Arc<impl Device>,
    checkpoint: &Arc<Checkpoint>,
    ids: Vec<u32>,
    cut: impl Into<Cut>,
) -> Vec<u32> {
    let (checkpoint, cut) = (Arc::clone(checkpoint), cut.into());
    let compute = move || {
        let mut moe = MoeCaller::new(Experts::new(), 1).expect("a lane");
        let all = logits(&mut trunk(device, &checkpoint, 640), &mut moe, &ids, cut).expect("logits");
        all.into_iter().map(f32::to_bits).collect()
    };
    tokio::task::spawn_blocking(compute).await.expect("does not panic")
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_and_single_tokens_give_the_bits_of_the_full_forward() {
    for shape in [&MOE, &checkpoint::DENSE_ONLY] {
        let (_dir, checkpoint) = checkpoint::open(shape);
        let ids = prompt(1, 150);
        let full = all_logits(reference(), &checkpoint, ids.clone(), 150).await;
        assert_eq!(full.len(), 150 * checkpoint::VOCAB);
        assert!(full.iter().all(|bits| f32::from_bits(*bits).is_finite()));
        for chunk in [1, 7, 64, 149] {
            assert!(all_logits(reference(), &checkpoint, ids.clone(), chunk).await == full, "chunks of {chunk}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cpu_device_keeps_its_bits_too() {
    let (_dir, checkpoint) = checkpoint::open(&MOE);
    let ids = prompt(3, 150);
    let full = all_logits(cpu(), &checkpoint, ids.clone(), 150).await;
    for chunk in [1, 13] {
        assert!(all_logits(cpu(), &checkpoint, ids.clone(), chunk).await == full, "chunks of {chunk}");
    }
    for chunk in [150, 13, 2] {
        let halves = Cut { chunk, halves: true };
        assert!(all_logits(cpu(), &checkpoint, ids.clone(), halves).await == full, "chunks of {chunk} in halves");
    }
    let fixture = start_on(cpu(), &MOE, |_| {});
    let mut alone = Vec::new();
    for request in requests() {
        alone.push(fixture.answer(request).await);
    }
    let chunked = start_on(cpu(), &MOE, |config| config.prefill_chunk = 16);
    assert!(chunked.answers(&requests()).await == alone);
}

#[tokio::test(flavor = "multi_thread")]
async fn splits_of_the_keys_do_not_depend_on_chunks() {
    let (_dir, checkpoint) = checkpoint::open(&MOE);
    let ids = prompt(2, 600);
    let full = all_logits(reference(), &checkpoint, ids.clone(), 600).await;
    assert!(all_logits(reference(), &checkpoint, ids, 37).await == full);
}

/// Requests of many lengths, greedy and sampled; the sequences cross cache blocks.
fn requests() -> Vec<SequenceRequest> {
    let request = |i: u64| {
        let tokens = prompt(i, [1, 3, 20, 60, 64, 70, 130, 200][i as usize % 8]);
        let base = if i.is_multiple_of(3) { request(tokens) } else { sampled(tokens, i) };
        SequenceRequest { max_tokens: 12 + i as u32, choice: i as u32 % 2, prompt_logprobs: Some(2), ..base }
    };
    (0..12).map(request).collect()
}

async fn one_by_one(change: impl FnOnce(&mut AttentionConfig)) -> Vec<Answer> {
    let fixture = start(change);
    let mut answers = Vec::new();
    for request in requests() {
        answers.push(fixture.answer(request).await);
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_gives_what_each_request_gives_alone() {
    let alone = one_by_one(|_| {}).await;
    for (answer, request) in alone.iter().zip(requests()) {
        assert_eq!(answer.tokens.len(), request.max_tokens as usize);
        assert_eq!(answer.scores.len(), request.tokens.len() - 1);
    }
    let distinct: std::collections::HashSet<u32> = alone.iter().flat_map(Answer::ids).collect();
    assert!(distinct.len() > 20, "the model says different things: {distinct:?}");
    let batch = start(|_| {}).answers(&requests()).await;
    assert!(batch == alone, "in a batch");
    let chunked = one_by_one(|config| config.prefill_chunk = 16).await;
    assert!(chunked == alone, "chunks of 16");
    let crowded = |config: &mut conclave_attention::AttentionConfig| {
        (config.step_tokens, config.max_running, config.prefill_chunk) = (7, 5, 6);
    };
    assert!(start(crowded).answers(&requests()).await == alone, "few rows a step");
    let halved = start(|config| config.micro_batches = MicroBatches::Two);
    assert!(halved.answers(&requests()).await == alone, "two micro-batches");
    assert!(halved.metric("conclave_attention_halved_steps_total") > 10.0);
    let hurried = start(|config| config.step_target = Duration::ZERO);
    assert!(hurried.answers(&requests()).await == alone, "as few rows of prompts a step as can be");
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_sequences_go_on_with_the_same_bits() {
    let alone = start(|_| {}).answers(&requests()).await;
    // The longest needs 4 blocks; 5 hold two or three sequences, not what they grow to.
    let tight = start(|config| config.cache = CacheSize::Blocks(5));
    let answers = tight.answers(&requests()).await;
    assert!(tight.metric("conclave_attention_preemptions_total") > 0.0, "nothing was preempted");
    assert!(answers == alone);
    tight.until("idle", Fixture::idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_goes_on_where_one_stopped() {
    let fixture = start(|_| {});
    for request in requests() {
        let whole = fixture.answer(request.clone()).await;
        let other = start(|config| config.prefill_chunk = 50);
        for done in [1, 5, whole.tokens.len() - 1, whole.tokens.len()] {
            let mut tokens = request.tokens.clone();
            tokens.extend(&whole.ids()[..done]);
            let rest = other.answer(SequenceRequest { tokens, ..request.clone() }).await;
            assert_eq!(rest.tokens, whole.tokens[done..], "after {done} tokens");
            assert_eq!(rest.finished, whole.finished);
            assert!(rest.scores.is_empty(), "the prompt is not scored again");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_prefix_gives_the_bits_of_a_computed_one() {
    let ids = prompt(5, 300);
    let longer = [&ids[..200], &prompt(6, 90)].concat();
    let fresh = |tokens: &[u32]| sampled(tokens.to_vec(), 9);
    let (first, branch) = (start(|_| {}).answer(fresh(&ids)).await, start(|_| {}).answer(fresh(&longer)).await);

    let fixture = start(|config| config.prefill_chunk = 37);
    let found =
        [fixture.answer(fresh(&ids)).await, fixture.answer(fresh(&ids)).await, fixture.answer(fresh(&longer)).await];
    assert_eq!(found.each_ref().map(|answer| answer.cached), [0, 256, 192]);
    assert!(found == [first.clone(), first.clone(), branch]);
    assert_eq!(fixture.metric("conclave_attention_cached_prompt_tokens_total"), 448.0);

    // What was generated is part of the prefix too: the next turn of a conversation.
    let turn = [&ids[..], &first.ids(), &prompt(7, 20)].concat();
    let next = fixture.answer(fresh(&turn)).await;
    assert_eq!(next.cached, 256, "300 and 10 tokens fill four blocks");
    assert!(next == start(|_| {}).answer(fresh(&turn)).await);

    let salted = SequenceRequest { cache_salt: vec![1].into(), ..fresh(&ids) };
    let scored = SequenceRequest { prompt_logprobs: Some(0), ..fresh(&ids) };
    for request in [salted, scored] {
        let answer = fixture.answer(request).await;
        assert_eq!((answer.cached, answer.tokens), (0, first.tokens.clone()));
    }
    fixture.until("idle", Fixture::idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefixes_give_way_to_sequences() {
    let prompts: Vec<SequenceRequest> = (0..8).map(|i| sampled(prompt(i, 130), i)).collect();
    let alone = start(|_| {}).answers(&prompts).await;
    // Three blocks each; the cache holds two of them.
    let tight = start(|config| config.cache = CacheSize::Blocks(6));
    for _ in 0..2 {
        assert!(tight.answers(&prompts).await == alone);
    }
    assert!(tight.metric("conclave_attention_cache_blocks_evicted_total") > 8.0);
    tight.until("idle", Fixture::idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_scores_are_the_log_softmax_of_the_forward() {
    let fixture = start(|config| config.prefill_chunk = 33);
    let ids = prompt(4, 100);
    let only_scores = SequenceRequest { max_tokens: 0, prompt_logprobs: Some(1), ..request(ids.clone()) };
    let answer = fixture.answer(only_scores).await;
    assert_eq!((answer.tokens.len(), answer.scores.len()), (0, 99));
    let all = all_logits(reference(), &fixture.checkpoint, ids.clone(), 100).await;
    for (score, position) in answer.scores.iter().zip(1..) {
        let row: Vec<f64> = all[(position - 1) * checkpoint::VOCAB..position * checkpoint::VOCAB]
            .iter()
            .map(|bits| f64::from(f32::from_bits(*bits)))
            .collect();
        let log_sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        let expected = row[ids[position] as usize] - log_sum;
        assert_eq!((score.token, score.position as usize), (ids[position], position));
        assert!((f64::from(score.logprob.expect("asked for")) - expected).abs() < 1e-5);
        let best = row.iter().copied().fold(f64::MIN, f64::max) - log_sum;
        assert!((f64::from(score.top[0].logprob) - best).abs() < 1e-5);
    }
}
