//! Draws of tokens, against the rules of the attention service's sampler written down once more.

use conclave_kernels::cuda::plain::{AdjustLogits, Adjustment, Draw, Penalties, Sample};
use proptest::prelude::*;

use crate::support::{Numbers, run};

/// Bits of the ids that may be drawn.
fn words(vocab: usize, allowed: impl Fn(usize) -> bool) -> Vec<u32> {
    let bit = |id: usize| u32::from(id < vocab && allowed(id)) << (id % 32);
    (0..vocab.div_ceil(32)).map(|word| (word * 32..word * 32 + 32).map(bit).sum()).collect()
}

/// Shares of the ids that are left, ascending by id, before the last step.
fn candidates(logits: &[f32], allowed: impl Fn(usize) -> bool, draw: &Draw) -> Vec<(usize, f64)> {
    let mut best: Vec<usize> = (0..logits.len()).filter(|id| allowed(*id) && logits[*id] > f32::NEG_INFINITY).collect();
    best.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
    if draw.top_k > 0 {
        best.truncate(draw.top_k as usize);
    }
    let weight = |id: usize| ((f64::from(logits[id]) - f64::from(logits[best[0]])) / f64::from(draw.temperature)).exp();
    let weights: Vec<(usize, f64)> = best.iter().map(|id| (*id, weight(*id))).collect();
    let wanted = f64::from(draw.top_p) * weights.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let reached = weights.iter().position(|(_, weight)| {
        sum += weight;
        sum >= wanted
    });
    let nucleus = if draw.top_p < 1.0 { reached.map_or(weights.len(), |last| last + 1) } else { weights.len() };
    let kept = weights[..nucleus].iter().filter(|(_, weight)| *weight >= f64::from(draw.min_p));
    let mut kept: Vec<(usize, f64)> = kept.copied().collect();
    kept.sort_unstable_by_key(|(id, _)| *id);
    kept
}

fn expected(logits: &[f32], allowed: impl Fn(usize) -> bool, draw: &Draw) -> u32 {
    if draw.temperature == 0.0 {
        let greedy = Draw { temperature: 1.0, top_k: 1, top_p: 1.0, min_p: 0.0, ..*draw };
        return candidates(logits, allowed, &greedy)[0].0 as u32;
    }
    let kept = candidates(logits, allowed, draw);
    let wanted = draw.u * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let passes = kept.iter().find(|(_, weight)| {
        sum += weight;
        sum > wanted
    });
    passes.or(kept.last()).unwrap().0 as u32
}

fn found(logits: &[f32], allowed: Option<&[u32]>, draws: &[Draw]) -> Vec<u32> {
    let vocab = logits.len() / draws.len();
    run(|rig| {
        let (logits, draws_at, words) = (rig.upload(logits), rig.upload(draws), rig.upload(allowed.unwrap_or(&[])));
        let (weights, out) = (rig.poisoned::<f64>(draws.len() * vocab), rig.poisoned::<u32>(draws.len()));
        Sample {
            logits: rig.at(&logits),
            allowed: if allowed.is_some() { rig.at(&words) } else { 0 },
            draws: rig.at(&draws_at),
            weights: rig.at(&weights),
            out: rig.at(&out),
            vocab: vocab as u32,
            rows: draws.len() as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download::<u32>(&out, draws.len()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn tokens_are_drawn_by_the_rules(
        vocab in prop_oneof![1usize..40, 500usize..1500],
        draws in prop::collection::vec(
            (0.0f64..1.0, prop_oneof![Just(0f32), 0.2f32..2.0], 0u32..50, 0.05f32..1.1, prop_oneof![Just(0f32), 0f32..0.5]),
            1..4,
        ),
        masked in 2usize..5,
        seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        // Few different values: equal logits are common.
        let logits: Vec<f32> =
            (0..vocab * draws.len()).map(|_| numbers.below(60) as f32 / 8.0 - 4.0).collect();
        let draws: Vec<Draw> = draws
            .into_iter()
            .map(|(u, temperature, top_k, top_p, min_p)| Draw { u, temperature, top_k, top_p: top_p.min(1.0), min_p })
            .collect();
        let allowed = |id: usize| id % masked != 1;
        let tokens = found(&logits, Some(&words(vocab, allowed)), &draws);
        let free = found(&logits, None, &draws);
        for (row, draw) in draws.iter().enumerate() {
            let logits = &logits[row * vocab..][..vocab];
            prop_assert_eq!(tokens[row], expected(logits, allowed, draw), "row {} of {:?}", row, draws);
            prop_assert_eq!(free[row], expected(logits, |_| true, draw), "row {} of {:?}", row, draws);
        }
    }
}

#[test]
fn what_cannot_be_drawn_from_is_told() {
    let draw = Draw { u: 0.5, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let mut logits = vec![0.5f32; 4 * 100];
    logits[50] = f32::NAN;
    logits[150] = f32::INFINITY;
    logits[200..300].fill(f32::NEG_INFINITY);
    logits[300..399].fill(f32::NEG_INFINITY);
    assert_eq!(found(&logits, None, &[draw; 4]), [u32::MAX, u32::MAX, u32::MAX, 99]);
    assert_eq!(found(&[1.0; 40], Some(&[0, 0]), &[draw]), [u32::MAX]);
}

#[test]
fn penalties_come_before_biases() {
    let (rows, vocab) = (2usize, 50usize);
    let logits = Numbers::new(3).vector(rows * vocab, 4.0);
    let penalties = [
        Penalties { repetition: 1.25, presence: 0.5, frequency: 0.125 },
        Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 },
    ];
    let change = |row, id, occurred, generated, bias| Adjustment { row, id, occurred, generated, bias };
    let mut changes = vec![change(0, 3, 1, 0, 0.0), change(0, 4, 1, 3, 1.5), change(1, 49, 0, 0, -2.0)];
    changes.extend([change(1, 7, 1, 2, 0.0), change(0, 9, 0, 0, f32::MAX), change(1, 8, 0, 0, f32::NEG_INFINITY)]);
    let found = run(|rig| {
        let (logits_at, changes_at, penalties) = (rig.upload(&logits), rig.upload(&changes), rig.upload(&penalties));
        AdjustLogits {
            logits: rig.at(&logits_at),
            changes: rig.at(&changes_at),
            penalties: rig.at(&penalties),
            vocab: vocab as u32,
            count: changes.len() as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download::<f32>(&logits_at, rows * vocab))
    });
    let mut expected = logits.clone();
    for change in &changes {
        let (logit, penalties) =
            (&mut expected[change.row as usize * vocab + change.id as usize], penalties[change.row as usize]);
        if change.occurred == 1 {
            *logit = if *logit > 0.0 { *logit / penalties.repetition } else { *logit * penalties.repetition };
        }
        if change.generated > 0 {
            *logit -= penalties.presence + penalties.frequency * change.generated as f32;
        }
        *logit = (*logit + change.bias).clamp(f32::MIN, f32::MAX);
    }
    assert_eq!(found, expected);
    assert!(found.iter().all(|logit| logit.is_finite()));
}
