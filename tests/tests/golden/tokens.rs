//! Tokens that the CUDA device finds itself, on the shim, beside those that the attention service draws from the same logits.

use std::{collections::HashMap, sync::Arc};

use conclave_attention::{
    AttentionConfig, AttentionService, CacheSize, TokenStream,
    sampler::{self, History, Params, Position, TokenMask, sample},
};
use conclave_kernels::{
    Device, FoundToken, TokenAsk, TokenSource,
    cuda::{Cuda, Shim},
};
use conclave_proto::{
    InstanceId,
    v1::{Sampling, ScoredToken, SequenceRequest, token_event::Event},
};
use conclave_tests::demo_model;
use futures::StreamExt;
use prometheus::Registry;

use crate::{cuda::shim, files::demo_sequences, system::System};

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Settings in which anything may be in use.
    fn settings(&mut self, vocab: usize) -> Sampling {
        let biases = self.pick(&[0, 0, 3]);
        Sampling {
            seed: self.below(1000) as u64,
            temperature: self.pick(&[0.0, 0.3, 1.0, 1.7]),
            top_k: self.pick(&[0, 0, 1, 7, 40]),
            top_p: self.pick(&[1.0, 0.2, 0.9, 0.999]),
            min_p: self.pick(&[0.0, 0.0, 0.05, 1.0]),
            repetition_penalty: self.pick(&[1.0, 1.0, 1.3]),
            presence_penalty: self.pick(&[0.0, 0.5]),
            frequency_penalty: self.pick(&[0.0, 0.0, -0.25]),
            logit_bias: (0..biases).map(|_| (self.below(vocab) as u32, self.pick(&[-100.0, 2.0, 100.0]))).collect(),
            min_tokens: 0,
        }
    }

    /// Logits of which many are equal, or none.
    fn logits(&mut self, vocab: usize) -> Vec<f32> {
        let levels = self.pick(&[40, 1 << 20]);
        (0..vocab).map(|_| self.below(levels) as f32 / levels as f32 * 20.0 - 8.0).collect()
    }
}

/// A row: what it is asked, and of what.
struct Case {
    logits: Vec<f32>,
    params: Params,
    history: History,
    banned: Vec<u32>,
    position: u32,
    top: Option<usize>,
}

impl Case {
    fn new(numbers: &mut Numbers, vocab: usize) -> Self {
        let tokens: Vec<u32> = (0..12).map(|_| numbers.below(vocab) as u32).collect();
        Self {
            logits: numbers.logits(vocab),
            params: Params::new(&numbers.settings(vocab), vocab).unwrap(),
            history: History::new(&tokens, 5),
            banned: (0..numbers.pick(&[0, 0, 2])).map(|_| numbers.below(vocab) as u32).collect(),
            position: numbers.below(1000) as u32,
            top: numbers.pick(&[None, Some(0), Some(4)]),
        }
    }

    fn at(&self) -> Position<'_> {
        Position { position: self.position, choice: 1, history: &self.history, banned: &self.banned }
    }

    fn ask(&self) -> TokenAsk<'_> {
        TokenAsk { token: TokenSource::Drawn(self.params.drawing(self.at())), top: self.top }
    }
}

fn find(device: &Cuda<Shim>, mask: &TokenMask, logits: Vec<f32>, asks: &[TokenAsk<'_>]) -> Vec<Option<FoundToken>> {
    let mut buffer = device.load_vector(logits.clone()).unwrap();
    let found = device.find_tokens(&mut buffer, mask.words(), asks).unwrap();
    let mut after = Vec::new();
    device.read(&mut buffer, &mut after).unwrap();
    assert!(after.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits()), "logits stay as they are");
    found
}

/// Sums that round otherwise may make a difference in the last bit.
fn assert_near(found: f32, expected: f32, what: &str) {
    assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{what}: found {found}, expected {expected}");
}

fn assert_found(found: &FoundToken, expected: &FoundToken, what: &str) {
    assert_eq!(found.token, expected.token, "{what}");
    assert_eq!((found.logprob.is_some(), found.top.len()), (expected.logprob.is_some(), expected.top.len()), "{what}");
    assert_near(found.logprob.unwrap_or(0.0), expected.logprob.unwrap_or(0.0), what);
    for (rank, (found, expected)) in found.top.iter().zip(&expected.top).enumerate() {
        assert_eq!(found.0, expected.0, "{what}: rank {rank}");
        assert_near(found.1, expected.1, what);
    }
}

fn check(device: &Cuda<Shim>, seed: u64, vocab: usize) {
    let mut numbers = Numbers(seed);
    let mask = TokenMask::new(vocab, |id| id % 7 != 3 || id as usize + 1 == vocab);
    let cases: Vec<Case> = (0..8).map(|_| Case::new(&mut numbers, vocab)).collect();
    let asks: Vec<TokenAsk<'_>> = cases.iter().map(Case::ask).collect();
    let logits = cases.iter().flat_map(|case| case.logits.clone()).collect();
    for ((row, case), found) in cases.iter().enumerate().zip(find(device, &mask, logits, &asks)) {
        let what = format!("row {row} of seed {seed}, vocabulary {vocab}: {:?}", case.params);
        let found = found.unwrap_or_else(|| panic!("nothing found: {what}"));
        let token = sample(&case.params, &mask, &case.logits, case.at()).unwrap();
        assert_found(&found, &sampler::found(&case.logits, token, case.top), &what);
    }
}

#[test]
fn tokens_and_logprobs_are_those_of_the_sampler() {
    let device = Cuda::new(Shim::new(3));
    for seed in 0..6 {
        for vocab in [33, 1000, 2081] {
            check(&device, seed * 100 + vocab as u64, vocab);
        }
    }
}

#[test]
fn rows_without_a_token_are_told() {
    let (device, vocab) = (Cuda::new(Shim::new(4)), 70);
    let mut cases: Vec<Case> = (0..4).map(|seed| Case::new(&mut Numbers(seed), vocab)).collect();
    cases[0].logits[69] = f32::NAN;
    cases[1].banned = (0..70).collect();
    cases[2].logits[2] = f32::NEG_INFINITY;
    cases[3].top = Some(3);
    let logits: Vec<f32> = cases.iter().flat_map(|case| case.logits.clone()).collect();
    let asks: Vec<TokenAsk<'_>> = cases.iter().map(Case::ask).collect();
    let found = find(&device, &TokenMask::new(vocab, |_| true), logits.clone(), &asks);
    assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [false, false, false, true]);
    let known = |top| TokenAsk { token: TokenSource::Known(5), top: Some(top) };
    let found = find(&device, &TokenMask::new(vocab, |_| false), logits, &[known(1), known(0), known(2), known(500)]);
    assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true, false, true]);
    assert_eq!(found[3].as_ref().unwrap().top.len(), vocab, "no more than there are");
}

fn requests(prompt: &[u32]) -> Vec<SequenceRequest> {
    let greedy = Sampling { seed: 11, top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() };
    let sampled = Sampling {
        temperature: 0.9,
        top_k: 100,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: HashMap::from([(5, 1.5), (17, -2.0)]),
        min_tokens: 2,
        ..greedy.clone()
    };
    let request = SequenceRequest {
        tokens: prompt.to_vec(),
        prompt_len: prompt.len() as u32,
        max_tokens: 3,
        ..SequenceRequest::default()
    };
    vec![
        SequenceRequest { sampling: Some(greedy), prompt_logprobs: Some(2), logprobs: Some(3), ..request.clone() },
        SequenceRequest { sampling: Some(sampled), stop_token_ids: vec![1, 2, 3], ..request },
    ]
}

/// The scores and tokens of a stream.
async fn collect(stream: TokenStream) -> Vec<ScoredToken> {
    let mut stream = Box::pin(stream);
    let mut all = Vec::new();
    while let Some(event) = stream.next().await {
        match event.unwrap().event {
            Some(Event::Prompt(scores)) => all.extend(scores.tokens),
            Some(Event::Token(token)) => all.push(token),
            _ => {}
        }
    }
    all
}

/// A service that may draw these ids.
fn service(system: &System<Cuda<Shim>>, allowed_tokens: Option<TokenMask>) -> Arc<AttentionService> {
    let id = InstanceId("attention-1".into());
    let config = AttentionConfig { cache: CacheSize::Blocks(4), allowed_tokens, ..AttentionConfig::new(id) };
    AttentionService::start(config, shim(), system.checkpoint().clone(), system.link(), &Registry::new()).unwrap()
}

/// Scores and tokens of each, computed together.
async fn answers(system: &System<Cuda<Shim>>, requests: &[SequenceRequest]) -> Vec<Vec<ScoredToken>> {
    let service = service(system, None);
    let streams: Vec<_> = requests.iter().map(|request| service.generate(request.clone()).unwrap()).collect();
    futures::future::join_all(streams.into_iter().map(collect)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_on_the_demo_checkpoint_gives_the_tokens_of_its_logits() {
    let mut system = System::start(&demo_model(), shim, 2).await;
    let vocab = system.vocab();
    let mask = TokenMask::new(vocab, |_| true);
    let requests = requests(&demo_sequences()[0].ids[..6]);
    for (request, found) in requests.iter().zip(answers(&system, &requests).await) {
        let scores = if request.prompt_logprobs.is_some() { request.tokens.len() - 1 } else { 0 };
        assert_eq!(found.len(), scores + 3);
        let (prompt, generated) = found.split_at(scores);
        let mut ids = request.tokens.clone();
        ids.extend(generated.iter().map(|token| token.token));
        let logits = system.logits(&ids[..ids.len() - 1], ids.len()).await;
        let params = Params::new(request.sampling.as_ref().unwrap(), vocab).unwrap();
        for scored in prompt.iter().chain(generated) {
            let position = scored.position as usize;
            let row = &logits[(position - 1) * vocab..][..vocab];
            let (top, token) = if position < request.tokens.len() {
                (request.prompt_logprobs, ids[position])
            } else {
                let history = History::new(&ids[..position], request.tokens.len());
                let early = position - request.tokens.len() < params.min_tokens;
                let banned: &[u32] = if early { &request.stop_token_ids } else { &[] };
                let at = Position { position: scored.position, choice: 0, history: &history, banned };
                (request.logprobs, sample(&params, &mask, row, at).unwrap())
            };
            let found = FoundToken {
                token: scored.token,
                logprob: scored.logprob,
                top: scored.top.iter().map(|entry| (entry.token, entry.logprob)).collect(),
            };
            let expected = sampler::found(row, token, top.map(|top| top as usize));
            assert_found(&found, &expected, &format!("position {position}"));
        }
    }
}

/// The host reads the logits of a row without a token, and says what is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn the_service_says_why_there_is_no_token() {
    let system = System::start(&demo_model(), shim, 1).await;
    let service = service(&system, Some(TokenMask::new(system.vocab(), |id| id == 5)));
    let [greedy, _] = &requests(&[7, 8])[..] else { panic!("two requests") };
    let sampling = greedy.sampling.clone().map(|sampling| Sampling { min_tokens: 1, ..sampling });
    let request = SequenceRequest { sampling, stop_token_ids: vec![5], prompt_logprobs: None, ..greedy.clone() };
    let events: Vec<_> = service.generate(request).unwrap().collect().await;
    let errors: Vec<String> = events.into_iter().map(|event| event.unwrap_err().message).collect();
    assert_eq!(errors, ["position 2: every id is masked, expected at least one allowed"]);
}
