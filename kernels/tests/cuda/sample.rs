//! Draws of tokens, against the rules of the attention service's sampler written down once more.

use conclave_kernels::cuda::plain::{
    AdjustLogits, Adjustment, Draw, Likely, Penalties, RestoreLogits, RowScore, Sample, Score, Scored,
};
use proptest::prelude::*;

use crate::support::{Numbers, run};

/// Bits of the ids that may be drawn.
fn words(vocab: usize, allowed: impl Fn(usize) -> bool) -> Vec<u32> {
    let bit = |id: usize| u32::from(id < vocab && allowed(id)) << (id % 32);
    (0..vocab.div_ceil(32)).map(|word| (word * 32..word * 32 + 32).map(bit).sum()).collect()
}

/// Shares of the ids that are left, ascending by id, before the last step.
fn candidates(logits: &[f32], allowed: impl Fn(usize) -> bool, draw: &Draw) -> Vec<(usize, f64)> {
    let mut best: Vec<usize> = (0..logits.len()).filter(|id| allowed(*id)).collect();
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

/// Tokens of all rows of `logits [R, V]`; draws name masks `[M]`.
fn found(logits: &[f32], masks: &[Vec<u32>], draws: &[Draw]) -> Vec<u32> {
    let (vocab, words) = (logits.len() / draws.len(), masks[0].len());
    run(|rig| {
        let (logits, draws_at, masks) = (rig.upload(logits), rig.upload(draws), rig.upload(&masks.concat()));
        let tokens = rig.poisoned::<u32>(draws.len());
        Sample {
            logits: rig.at(&logits),
            draws: rig.at(&draws_at),
            masks: rig.at(&masks),
            tokens: rig.at(&tokens),
            vocab: vocab as u32,
            words: words as u32,
            draw_count: draws.len() as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download::<u32>(&tokens, draws.len()))
    })
}

fn all(vocab: usize) -> Vec<Vec<u32>> {
    vec![words(vocab, |_| true)]
}

const PLAIN: Draw = Draw { u: 0.5, row: 0, mask: 0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn tokens_are_drawn_by_the_rules(
        vocab in prop_oneof![1usize..40, 500usize..1500, Just(2300), Just(9001)],
        draws in prop::collection::vec(
            (0.0f64..1.0, prop_oneof![Just(0f32), 0.2f32..2.0], 0u32..50, 0.05f32..1.1, prop_oneof![Just(0f32), 0f32..0.5]),
            1..4,
        ),
        masked in 2usize..5,
        levels in prop_oneof![Just(60u32), Just(1 << 20)],
        seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        // Few different values: equal logits are common. Many: they are not.
        let logits: Vec<f32> =
            (0..vocab * draws.len()).map(|_| numbers.below(levels) as f32 / (levels as f32 / 7.5) - 4.0).collect();
        let draws: Vec<Draw> = (0..)
            .zip(draws)
            .map(|(row, (u, temperature, top_k, top_p, min_p))| {
                Draw { u, row, mask: row % 2, temperature, top_k, top_p: top_p.min(1.0), min_p }
            })
            .collect();
        let allowed = |row: usize, id: usize| row.is_multiple_of(2) || id % masked != 1;
        let masks: Vec<Vec<u32>> = (0..2).map(|mask| words(vocab, |id| allowed(mask, id))).collect();
        let tokens = found(&logits, &masks, &draws);
        for (row, draw) in draws.iter().enumerate() {
            let logits = &logits[row * vocab..][..vocab];
            prop_assert_eq!(tokens[row], expected(logits, |id| allowed(row, id), draw), "row {} of {:?}", row, draws);
        }
    }
}

/// More ids at the distance at which a rule cuts than are listed there.
#[test]
fn many_equal_logits_are_cut_by_id() {
    let vocab = 3000;
    let logits: Vec<f32> = (0..vocab).map(|id| if id % 2 == 0 { 1.5 } else { 1.0 }).collect();
    let draws = [
        Draw { top_k: 1200, u: 0.999_999, ..PLAIN },
        Draw { row: 1, top_k: 2000, u: 0.999_999, ..PLAIN },
        Draw { row: 2, top_p: 0.3, u: 0.999_999, ..PLAIN },
    ];
    let expected: Vec<u32> = draws.iter().map(|draw| expected(&logits, |_| true, draw)).collect();
    assert_eq!(expected[..2], [2 * 1199, 2998]);
    assert_eq!(found(&logits.repeat(3), &all(vocab), &draws), expected);
}

/// Candidates so far from the best that their shares are nothing, and so near that they are all the same.
#[test]
fn extreme_temperatures_and_distances() {
    let logits: Vec<f32> = (0..600).map(|id| if id == 77 { 3.0e38 } else { -3.0e38 + id as f32 }).collect();
    let draws = [
        Draw { temperature: f32::MIN_POSITIVE, top_p: 0.9, u: 0.99, ..PLAIN },
        Draw { row: 1, temperature: f32::MAX, u: 0.999, ..PLAIN },
        Draw { row: 2, top_k: 3, u: 0.999_999, ..PLAIN },
    ];
    let tokens = found(&logits.repeat(3), &all(600), &draws);
    assert_eq!((tokens[0], tokens[2]), (77, 77));
    assert_eq!(tokens[1], expected(&logits, |_| true, &draws[1]));
}

#[test]
fn what_cannot_be_drawn_from_is_told() {
    let mut logits = vec![0.5f32; 5 * 100];
    logits[50] = f32::NAN;
    logits[150] = f32::INFINITY;
    logits[250] = f32::NEG_INFINITY;
    let masks = [words(100, |id| id % 50 != 0), words(100, |_| false)];
    let draws: Vec<Draw> = (0..5).map(|row| Draw { row, mask: u32::from(row == 3), ..PLAIN }).collect();
    assert_eq!(found(&logits, &masks, &draws), [u32::MAX, u32::MAX, u32::MAX, u32::MAX, 51]);
}

#[test]
fn greedy_takes_the_lowest_id_of_the_best() {
    let mut numbers = Numbers::new(5);
    for vocab in [1, 31, 256, 1000, 5001] {
        let mut logits = numbers.vector(vocab, 9.0);
        [vocab / 3, vocab / 2, vocab - 1].into_iter().for_each(|at| logits[at] = 10.0);
        let token = found(&logits, &all(vocab), &[Draw { temperature: 0.0, ..PLAIN }]);
        assert_eq!(token, [vocab as u32 / 3], "{vocab}");
    }
    assert_eq!(found(&[-0.0, 0.0], &all(2), &[Draw { temperature: 0.0, ..PLAIN }]), [0]);
}

#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Row {
    score: RowScore,
    likely: [Likely; 5],
}

/// Scores of rows of `logits [R, V]` for tokens, the last first, with five places for likely tokens each.
fn scores(logits: &[f32], tokens: &[u32], top: &[u32]) -> Vec<Row> {
    let (vocab, rows) = (logits.len() / tokens.len(), tokens.len());
    let asked: Vec<Scored> = (0..rows as u32).zip(top).map(|(row, top)| Scored { row, top: *top }).rev().collect();
    run(|rig| {
        let (logits, asked_at, tokens) = (rig.upload(logits), rig.upload(&asked), rig.upload(tokens));
        let (out, likely) = (rig.poisoned::<RowScore>(rows), rig.poisoned::<Likely>(rows * 5));
        Score {
            logits: rig.at(&logits),
            asked: rig.at(&asked_at),
            tokens: rig.at(&tokens),
            out: rig.at(&out),
            likely: rig.at(&likely),
            vocab: vocab as u32,
            pitch: 5,
            rows: rows as u32,
        }
        .launch(&rig.driver)?;
        let (scores, likely) = (rig.download::<RowScore>(&out, rows), rig.download::<Likely>(&likely, rows * 5));
        Ok(scores.into_iter().zip(likely.as_chunks().0).map(|(score, likely)| Row { score, likely: *likely }).collect())
    })
}

#[test]
fn scores_are_the_softmax_and_the_best() {
    let (vocab, mut numbers) = (2501, Numbers::new(8));
    let mut logits: Vec<f32> = (0..4 * vocab).map(|_| numbers.below(300) as f32 / 20.0 - 9.0).collect();
    logits[3 * vocab + 7] = f32::NEG_INFINITY;
    let tokens = [17, 2500, u32::MAX, 4];
    let found = scores(&logits, &tokens, &[5, 0, 2, 1]);
    assert_eq!([found[0].score.sum, found[1].score.sum], [0.0, 0.0], "not finite, and no token");
    for (row, top) in [(0usize, 5usize), (1, 0)] {
        let (logits, found) = (&logits[row * vocab..][..vocab], found[3 - row]);
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let best = logits[order[0]];
        let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - f64::from(best)).exp()).sum();
        assert!((found.score.sum - sum).abs() < 1e-9 * sum, "{} and {sum}", found.score.sum);
        assert_eq!((found.score.best, found.score.logit), (best, logits[tokens[row] as usize]));
        let expected: Vec<Likely> =
            order[..top].iter().map(|id| Likely { id: *id as u32, logit: logits[*id] }).collect();
        assert_eq!(found.likely[..top], expected);
    }
}

#[test]
fn penalties_come_before_biases() {
    let (rows, vocab) = (2usize, 50usize);
    let logits = Numbers::new(3).vector(rows * vocab, 4.0);
    let penalties = [
        Penalties { repetition: 1.25, presence: 0.5, frequency: 0.125 },
        Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 },
    ];
    let change =
        |row, id, occurred, generated, bias| Adjustment { row, id, occurred, generated, bias, before: f32::NAN };
    let mut changes = vec![change(0, 3, 1, 0, 0.0), change(0, 4, 1, 3, 1.5), change(1, 49, 0, 0, -2.0)];
    changes.extend([change(1, 7, 1, 2, 0.0), change(0, 9, 0, 0, f32::MAX), change(1, 8, 0, 0, f32::NEG_INFINITY)]);
    let both = run(|rig| {
        let (logits_at, changes_at, penalties) = (rig.upload(&logits), rig.upload(&changes), rig.upload(&penalties));
        AdjustLogits {
            logits: rig.at(&logits_at),
            changes: rig.at(&changes_at),
            penalties: rig.at(&penalties),
            vocab: vocab as u32,
            count: changes.len() as u32,
        }
        .launch(&rig.driver)?;
        let changed = rig.download::<f32>(&logits_at, rows * vocab);
        let (logits, count) = (rig.at(&logits_at), changes.len() as u32);
        RestoreLogits { logits, changes: rig.at(&changes_at), vocab: vocab as u32, count }.launch(&rig.driver)?;
        Ok([changed, rig.download::<f32>(&logits_at, rows * vocab)].concat())
    });
    let (found, restored) = both.split_at(rows * vocab);
    assert_eq!(restored, logits);
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
