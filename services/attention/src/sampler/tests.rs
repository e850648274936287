use std::collections::HashMap;

use conclave_proto::v1::Sampling;
use proptest::prelude::*;

use super::*;

fn neutral() -> Sampling {
    Sampling { seed: 1, temperature: 1.0, top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() }
}

fn params(change: impl FnOnce(&mut Sampling)) -> Params {
    let mut sampling = neutral();
    change(&mut sampling);
    Params::new(&sampling, 64).unwrap()
}

fn at(position: u32, history: &History) -> Position<'_> {
    Position { position, choice: 0, history, banned: &[] }
}

fn all(vocab: usize) -> TokenMask {
    TokenMask::new(vocab, |_| true)
}

/// Which ids come up in 2000 draws.
fn support(params: &Params, logits: &[f32]) -> Vec<u32> {
    let (mask, history) = (all(logits.len()), History::default());
    let mut seen: Vec<u32> = (0..2000).map(|p| sample(params, &mask, logits, at(p, &history)).unwrap()).collect();
    seen.sort_unstable();
    seen.dedup();
    seen
}

#[test]
fn greedy_takes_the_lowest_id_of_the_best() {
    let greedy = params(|s| s.temperature = 0.0);
    assert_eq!(sample(&greedy, &all(4), &[1.0, 3.0, 3.0, -1.0], at(0, &History::default())), Ok(1));
    assert_eq!(sample(&greedy, &all(2), &[-0.0, 0.0], at(0, &History::default())), Ok(0));
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.0, 1.0, 2.0, -1.0];
    let (mask, history, plain) = (all(4), History::default(), params(|_| {}));
    let mut counts = [0f64; 4];
    (0..40_000).for_each(|p| counts[sample(&plain, &mask, &logits, at(p, &history)).unwrap() as usize] += 1.0);
    let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    let chi_square: f64 = (0..4)
        .map(|id| {
            let expected = 40_000.0 * f64::from(logits[id]).exp() / sum;
            (counts[id] - expected).powi(2) / expected
        })
        .sum();
    assert!(chi_square < 25.0, "{counts:?}: {chi_square}");
}

#[test]
fn filters_keep_what_they_should() {
    // Probabilities 0.5, 0.25, 0.125, 0.125.
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
    assert_eq!(support(&params(|_| {}), &logits), [0, 1, 2, 3]);
    assert_eq!(support(&params(|s| s.top_k = 1), &logits), [0]);
    assert_eq!(support(&params(|s| s.top_k = 3), &logits), [0, 1, 2], "the lower id of equals");
    assert_eq!(support(&params(|s| s.top_p = 0.49), &logits), [0]);
    assert_eq!(support(&params(|s| s.top_p = 0.74), &logits), [0, 1]);
    assert_eq!(support(&params(|s| s.top_p = 0.8), &logits), [0, 1, 2]);
    assert_eq!(support(&params(|s| s.min_p = 0.4), &logits), [0, 1]);
    assert_eq!(support(&params(|s| s.min_p = 1.0), &logits), [0]);
    // top-p counts what top-k left: 0.5 of 0.75 is 0.67.
    let both = params(|s| (s.top_k, s.top_p) = (2, 0.66));
    assert_eq!(support(&both, &logits), [0]);
}

#[test]
fn a_tiny_temperature_is_greedy_and_a_huge_one_uniform() {
    let logits = [1.0, 1.1, 0.9];
    assert_eq!(support(&params(|s| s.temperature = f32::MIN_POSITIVE), &logits), [1]);
    assert_eq!(support(&params(|s| s.temperature = f32::MAX), &[50.0, -50.0, 0.0]), [0, 1, 2]);
}

#[test]
fn penalties_count_what_they_should() {
    let history = History::new(&[0, 1, 1, 2], 1);
    let adjusted = |params: &Params| {
        let mut logits = vec![2.0, 2.0, -2.0, 2.0];
        params.penalise(&mut logits, &history);
        logits
    };
    assert_eq!(adjusted(&params(|s| s.repetition_penalty = 2.0)), [1.0, 1.0, -4.0, 2.0]);
    assert_eq!(adjusted(&params(|s| s.presence_penalty = 0.5)), [2.0, 1.5, -2.5, 2.0]);
    assert_eq!(adjusted(&params(|s| s.frequency_penalty = 0.5)), [2.0, 1.0, -2.5, 2.0]);
}

#[test]
fn masked_banned_and_biased_ids() {
    let greedy = params(|s| {
        s.temperature = 0.0;
        s.logit_bias = HashMap::from([(2, 3.0), (0, -5.0)]);
    });
    let logits = [9.0, 5.0, 2.5, 5.2];
    let history = History::default();
    assert_eq!(sample(&greedy, &all(4), &logits, at(0, &history)), Ok(2));
    let mask = TokenMask::new(4, |id| id != 2);
    assert_eq!(sample(&greedy, &mask, &logits, at(0, &history)), Ok(3));
    let banned = Position { banned: &[3], ..at(0, &history) };
    assert_eq!(sample(&greedy, &mask, &logits, banned), Ok(1));
    let nothing = TokenMask::new(4, |_| false);
    let error = sample(&greedy, &nothing, &logits, at(7, &history)).unwrap_err();
    assert!(error.message.contains("position 7"), "{error}");
}

#[test]
fn adjustments_that_overflow_stay_numbers() {
    let extreme = params(|s| {
        s.repetition_penalty = 1e-30;
        s.presence_penalty = -3.0e38;
    });
    let history = History::new(&[0, 1, 1], 1);
    let token = sample(&extreme, &all(3), &[1e20, 3e38, 0.0], at(0, &history)).unwrap();
    assert!(token < 2);
}

#[test]
fn numbers_that_are_none_are_an_error() {
    assert!(check_finite(&[0.0, -1.0], 3).is_ok());
    let error = check_finite(&[0.0, f32::NAN], 3).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("position 3") && error.message.contains("id 1"), "{error}");
}

#[test]
fn every_setting_is_checked() {
    let refused = |change: fn(&mut Sampling), field: &str| {
        let mut sampling = neutral();
        change(&mut sampling);
        let error = Params::new(&sampling, 64).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(field), "{error}");
        assert!(error.message.contains("expected"), "{error}");
    };
    refused(|s| s.temperature = -0.1, "temperature");
    refused(|s| s.temperature = f32::NAN, "temperature");
    refused(|s| s.top_p = 0.0, "top_p");
    refused(|s| s.top_p = 1.1, "top_p");
    refused(|s| s.min_p = -0.1, "min_p");
    refused(|s| s.repetition_penalty = 0.0, "repetition_penalty");
    refused(|s| s.presence_penalty = f32::INFINITY, "presence_penalty");
    refused(|s| s.frequency_penalty = f32::NAN, "frequency_penalty");
    refused(|s| s.logit_bias = HashMap::from([(64, 1.0)]), "logit_bias");
    refused(|s| s.logit_bias = HashMap::from([(3, f32::NAN)]), "logit_bias");
    refused(|s| s.logit_bias = (0..2000).map(|id| (id, 1.0)).collect(), "logit_bias");
}

proptest! {
    /// The partial sorts find the same candidates as sorting everything does.
    #[test]
    fn filters_agree_with_their_definition(
        logits in prop::collection::vec(-8i8..8, 1..300),
        top_k in 0usize..40,
        top_p in 0.01f32..1.0,
        u in 0.0f64..1.0,
    ) {
        let logits: Vec<f32> = logits.iter().map(|x| f32::from(*x) / 2.0).collect();
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let settings = params(|s| (s.temperature, s.top_k, s.top_p) = (0.7, top_k as u32, top_p));
        let (temperature, top_p) = (f64::from(0.7f32), f64::from(top_p));
        let mut sorted: Vec<(u32, f64)> = (0..).zip(&logits).map(|(id, x)| (id, f64::from(x - max) / temperature)).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        sorted.truncate(if top_k == 0 { usize::MAX } else { top_k });
        sorted.iter_mut().for_each(|(_, weight)| *weight = weight.exp());
        let total: f64 = sorted.iter().map(|(_, weight)| weight).sum();
        let mut before = 0.0;
        let mut nucleus = Vec::new();
        for (id, weight) in sorted {
            // Sums in another order differ in the last bits: leave those cases out.
            prop_assume!((before / total - top_p).abs() > 1e-9);
            if before / total >= top_p {
                break;
            }
            before += weight;
            nucleus.push(id);
        }
        nucleus.sort_unstable();
        let candidates = Candidates::new(&settings, logits, max);
        prop_assert_eq!(&candidates.ids(), &nucleus);
        prop_assert!(nucleus.contains(&candidates.draw(u)));
    }

    /// top-k keeps the best, ties by id, and whatever is drawn is among them.
    #[test]
    fn draws_are_among_the_best(logits in prop::collection::vec(-8i8..8, 1..300), top_k in 1usize..400, u in 0.0f64..1.0) {
        let logits: Vec<f32> = logits.iter().map(|x| f32::from(*x)).collect();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        sorted.sort_by(|a, b| order(*a, *b));
        let mut best: Vec<u32> = sorted.iter().take(top_k).map(|(id, _)| *id).collect();
        best.sort_unstable();
        let candidates = Candidates::new(&params(|s| s.top_k = top_k as u32), logits, sorted[0].1);
        prop_assert_eq!(&candidates.ids(), &best);
        prop_assert!(best.contains(&candidates.draw(u)));
    }
}
