//! The choice of experts and of the best token.

use conclave_kernels::cuda::plain::{
    GateSelect, METHOD_GREEDY, METHOD_GROUP_LIMITED_GREEDY, METHOD_NOAUX_TC, RULE_NORMALISED, RULE_NORMALISED_SCALED,
    RULE_SCALED, SCORING_SIGMOID, SCORING_SOFTMAX,
};
use proptest::prelude::*;

use crate::support::{Numbers, run};

#[derive(Debug, Clone, Copy)]
struct Gate {
    experts: usize,
    groups: usize,
    top_groups: usize,
    top_k: usize,
    scoring: u32,
    method: u32,
    rule: u32,
    scale: f32,
}

fn found(gate: &Gate, logits: &[f32], bias: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let rows = logits.len() / gate.experts;
    let both = run(|rig| {
        let (logits, bias) = (rig.upload(logits), rig.upload(bias));
        let (ids, weights) = (rig.poisoned::<u32>(rows * gate.top_k), rig.poisoned::<u32>(rows * gate.top_k));
        GateSelect {
            logits: rig.at(&logits),
            bias: if gate.method == METHOD_NOAUX_TC { rig.at(&bias) } else { 0 },
            ids: rig.at(&ids),
            weights: rig.at(&weights),
            experts: gate.experts as u32,
            groups: gate.groups as u32,
            top_groups: gate.top_groups as u32,
            top_k: gate.top_k as u32,
            scoring: gate.scoring,
            method: gate.method,
            rule: gate.rule,
            scale: gate.scale,
            rows: rows as u32,
        }
        .launch(&rig.driver)?;
        let length = rows * gate.top_k;
        Ok([rig.download::<u32>(&ids, length), rig.download::<u32>(&weights, length)].concat())
    });
    let (ids, weights) = both.split_at(rows * gate.top_k);
    (ids.to_vec(), weights.iter().map(|bits| f32::from_bits(*bits)).collect())
}

/// The best `count` of `of` by score, the lower index among equals.
fn best(of: impl Iterator<Item = usize>, score: impl Fn(usize) -> f64, count: usize) -> Vec<usize> {
    let mut all: Vec<usize> = of.collect();
    all.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
    all.truncate(count);
    all
}

/// Experts and weights of one row by definition, in double precision.
fn expected(gate: &Gate, logits: &[f32], bias: &[f32]) -> (Vec<u32>, Vec<f64>) {
    let exp: Vec<f64> = logits.iter().map(|z| f64::from(*z).exp()).collect();
    let total: f64 = exp.iter().sum();
    let score = |e: usize| if gate.scoring == SCORING_SOFTMAX { exp[e] / total } else { exp[e] / (1.0 + exp[e]) };
    let rank = |e: usize| score(e) + if gate.method == METHOD_NOAUX_TC { f64::from(bias[e]) } else { 0.0 };
    let size = gate.experts / gate.groups;
    let of_group = |group: usize| {
        let members = best(group * size..(group + 1) * size, rank, if gate.method == METHOD_NOAUX_TC { 2 } else { 1 });
        members.into_iter().map(rank).sum::<f64>()
    };
    let kept = if gate.method == METHOD_GREEDY { gate.groups } else { gate.top_groups };
    let groups = best(0..gate.groups, of_group, kept);
    let mut chosen = best((0..gate.experts).filter(|e| groups.contains(&(e / size))), rank, gate.top_k);
    chosen.sort_unstable();
    let sum: f64 = chosen.iter().map(|e| score(*e)).sum();
    let weight = |e: &usize| match gate.rule {
        RULE_SCALED => score(*e) * f64::from(gate.scale),
        RULE_NORMALISED => score(*e) / sum,
        _ => score(*e) / sum * f64::from(gate.scale),
    };
    (chosen.iter().map(|e| *e as u32).collect(), chosen.iter().map(weight).collect())
}

fn check(gate: &Gate, rows: usize, seed: u64) {
    let mut numbers = Numbers::new(seed);
    let (logits, bias) = (numbers.vector(rows * gate.experts, 4.0), numbers.vector(gate.experts, 0.3));
    let (ids, weights) = found(gate, &logits, &bias);
    for (row, logits) in logits.chunks_exact(gate.experts).enumerate() {
        let of_row = row * gate.top_k..(row + 1) * gate.top_k;
        let (expected_ids, expected_weights) = expected(gate, logits, &bias);
        assert_eq!(ids[of_row.clone()], expected_ids, "row {row} of {gate:?}");
        for (found, expected) in weights[of_row].iter().zip(expected_weights) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-5 * expected,
                "row {row} of {gate:?}: {found}, {expected}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn experts_are_chosen_by_definition(
        (groups, size, rows) in (1usize..6, 1usize..30, 1usize..5),
        (groups_share, k_share) in (0.0..1.0, 0.0..1.0),
        (scoring, method, rule) in (0u32..2, 0u32..3, 0u32..3),
        seed: u64,
    ) {
        let pick = |most: usize, share: f64| 1 + ((most - 1) as f64 * share) as usize;
        let top_groups = pick(groups, groups_share);
        let top_k = pick(if method == METHOD_GREEDY { groups } else { top_groups } * size, k_share);
        let gate = Gate { experts: groups * size, groups, top_groups, top_k, scoring, method, rule, scale: 2.5 };
        check(&gate, rows, seed);
    }
}

#[test]
fn gates_of_real_models() {
    let lite = Gate {
        experts: 64,
        groups: 1,
        top_groups: 1,
        top_k: 6,
        scoring: SCORING_SOFTMAX,
        method: METHOD_GREEDY,
        rule: RULE_SCALED,
        scale: 1.0,
    };
    let v2 = Gate { experts: 160, groups: 8, top_groups: 3, method: METHOD_GROUP_LIMITED_GREEDY, scale: 16.0, ..lite };
    let v3 = Gate {
        experts: 256,
        groups: 8,
        top_groups: 4,
        top_k: 8,
        scoring: SCORING_SIGMOID,
        method: METHOD_NOAUX_TC,
        rule: RULE_NORMALISED_SCALED,
        scale: 2.5,
    };
    [lite, v2, v3].iter().for_each(|gate| check(gate, 9, 3));
    let equal = found(&v2, &[0.5; 160], &[]);
    assert_eq!(equal.0, [0, 1, 2, 3, 4, 5], "equal scores go to the lower index");
    let mut logits = vec![0.5; 2 * 160];
    logits[3] = f32::NAN;
    assert_eq!(found(&v2, &logits, &[]).0, [[u32::MAX; 6], [0, 1, 2, 3, 4, 5]].concat());
}
