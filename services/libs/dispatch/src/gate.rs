//! The choice of experts: gate logits in, experts and weights out. Pure, in f32, with the same bits on every host.

use std::cmp::Ordering;

use conclave_model::{GateMethod, Scoring};

use crate::shape::{GateConfig, WeightRule};

/// Why logits cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GateError {
    /// Not rows of `E`.
    #[error("gate logits: found {found} values, expected {rows} rows of {experts}")]
    Size { found: usize, rows: usize, experts: usize },
    /// Not a number, or infinite.
    #[error("gate logits: found {value} at row {row}, expert {expert}, expected a finite number")]
    NotFinite { value: f32, row: usize, expert: usize },
    /// The method needs one bias an expert.
    #[error("gate correction bias: found {found} values, expected {expected}")]
    Bias { found: usize, expected: usize },
}

/// The experts of each row, ascending, with their weights.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Choices {
    /// Experts a row `K`.
    pub top_k: usize,
    /// `[rows, K]`, ascending within a row.
    pub experts: Vec<u32>,
    /// `[rows, K]`, the scaling factor included.
    pub weights: Vec<f32>,
}

impl Choices {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.experts.len().checked_div(self.top_k).unwrap_or(0)
    }

    /// Experts and weights of one row.
    pub fn row(&self, row: usize) -> (&[u32], &[f32]) {
        let span = row * self.top_k..(row + 1) * self.top_k;
        (&self.experts[span.clone()], &self.weights[span])
    }
}

/// Chooses the experts of each row. `logits [rows, E]`; `bias [E]` for the bias-corrected method, else empty.
///
/// Between equal scores the lower index wins. Masked groups count as minus infinity.
///
/// # Errors
/// When the sizes do not fit or a logit is not finite.
pub fn select(gate: &GateConfig, bias: &[f32], logits: &[f32], rows: usize) -> Result<Choices, GateError> {
    let experts = gate.experts;
    if experts.checked_mul(rows) != Some(logits.len()) {
        return Err(GateError::Size { found: logits.len(), rows, experts });
    }
    if gate.method == GateMethod::NoauxTc && bias.len() != experts {
        return Err(GateError::Bias { found: bias.len(), expected: experts });
    }
    let mut choices = Choices {
        top_k: gate.top_k,
        experts: Vec::with_capacity(rows * gate.top_k),
        weights: Vec::with_capacity(rows * gate.top_k),
    };
    let mut scratch = Scratch::default();
    for (row, logits) in logits.chunks_exact(experts).enumerate() {
        if let Some(expert) = logits.iter().position(|z| !z.is_finite()) {
            return Err(GateError::NotFinite { value: logits[expert], row, expert });
        }
        select_row(gate, bias, logits, &mut scratch, &mut choices);
    }
    Ok(choices)
}

/// Buffers of one row, kept between rows.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    biased: Vec<f32>,
    group_scores: Vec<f32>,
    kept: Vec<usize>,
    chosen: Vec<usize>,
}

fn select_row(gate: &GateConfig, bias: &[f32], logits: &[f32], scratch: &mut Scratch, choices: &mut Choices) {
    let Scratch { scores, biased, group_scores, kept, chosen } = scratch;
    match gate.scoring {
        Scoring::Softmax => softmax(logits, scores),
        Scoring::Sigmoid => sigmoid(logits, scores),
    }
    let size = gate.experts / gate.groups;
    let ranking: &[f32] = match gate.method {
        GateMethod::NoauxTc => {
            biased.clear();
            biased.extend(scores.iter().zip(bias).map(|(s, b)| s + b));
            biased
        }
        GateMethod::Greedy | GateMethod::GroupLimitedGreedy => scores,
    };
    kept.clear();
    match gate.method {
        GateMethod::Greedy => kept.extend(0..gate.groups),
        GateMethod::GroupLimitedGreedy | GateMethod::NoauxTc => {
            group_scores.clear();
            group_scores.extend(ranking.chunks_exact(size).map(|group| match gate.method {
                GateMethod::NoauxTc => two_best(group),
                _ => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            }));
            kept.extend(0..gate.groups);
            keep_best(kept, group_scores, gate.top_groups);
        }
    }
    chosen.clear();
    chosen.extend(kept.iter().flat_map(|group| group * size..(group + 1) * size));
    keep_best(chosen, ranking, gate.top_k);
    chosen.sort_unstable();
    weigh(gate, scores, chosen, choices);
}

/// Appends one row: the chosen experts and their weights.
fn weigh(gate: &GateConfig, scores: &[f32], chosen: &[usize], choices: &mut Choices) {
    let sum = chosen.iter().map(|&expert| scores[expert]).sum::<f32>() + 1e-20;
    for &expert in chosen {
        choices.experts.push(expert as u32);
        choices.weights.push(match gate.rule {
            WeightRule::Scaled => scores[expert] * gate.scale,
            WeightRule::Normalised => scores[expert] / sum,
            WeightRule::NormalisedScaled => scores[expert] / sum * gate.scale,
        });
    }
}

/// Leaves the `count` best of `indices`: higher score first, then lower index.
fn keep_best(indices: &mut Vec<usize>, scores: &[f32], count: usize) {
    let better = |a: &usize, b: &usize| -> Ordering { scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)) };
    if count < indices.len() {
        if count > 0 {
            indices.select_nth_unstable_by(count - 1, better);
        }
        indices.truncate(count);
    }
}

fn softmax(logits: &[f32], scores: &mut Vec<f32>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.clear();
    scores.extend(logits.iter().map(|z| libm::expf(z - max)));
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}

fn sigmoid(logits: &[f32], scores: &mut Vec<f32>) {
    scores.clear();
    scores.extend(logits.iter().map(|z| 1.0 / (1.0 + libm::expf(-z))));
}

/// Sum of the two largest values.
fn two_best(group: &[f32]) -> f32 {
    let (first, second) = group.iter().fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(first, second), &v| {
        if v > first { (v, first) } else { (first, second.max(v)) }
    });
    if group.len() < 2 { first } else { first + second }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gate(experts: usize, top_k: usize, groups: usize, top_groups: usize, method: GateMethod) -> GateConfig {
        let rule = WeightRule::Scaled;
        GateConfig { experts, top_k, groups, top_groups, method, scoring: Scoring::Softmax, rule, scale: 1.0 }
    }

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "found {found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn greedy_takes_the_best_of_all_with_softmax_over_all() {
        let gate = gate(4, 2, 1, 1, GateMethod::Greedy);
        let choices = select(&gate, &[], &[0.0, 1.0, -1.0, 2.0], 1).unwrap();
        let total: f64 = [0.0f64, 1.0, -1.0, 2.0].iter().map(|z| z.exp()).sum();
        assert_eq!(choices.experts, [1, 3]);
        close(&choices.weights, &[(1f64.exp() / total) as f32, (2f64.exp() / total) as f32]);
    }

    #[test]
    fn groups_are_limited_by_their_maximum() {
        // Group maxima 5, 4, 3: groups 0 and 1 stay, although group 2 has the third and fourth best expert.
        let logits = [5.0, -9.0, 4.0, -8.0, 3.0, 2.9];
        let gate = gate(6, 4, 3, 2, GateMethod::GroupLimitedGreedy);
        let choices = select(&gate, &[], &logits, 1).unwrap();
        assert_eq!(choices.experts, [0, 1, 2, 3]);
    }

    #[test]
    fn equal_scores_go_to_the_lower_index() {
        let greedy = gate(8, 3, 1, 1, GateMethod::Greedy);
        assert_eq!(select(&greedy, &[], &[0.5; 8], 1).unwrap().experts, [0, 1, 2]);
        let limited = gate(8, 3, 4, 2, GateMethod::GroupLimitedGreedy);
        assert_eq!(select(&limited, &[], &[0.5; 8], 1).unwrap().experts, [0, 1, 2]);
    }

    #[test]
    fn weight_rules_differ_as_specified() {
        let logits = [0.0, 1.0, -1.0, 2.0];
        let total: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        let (a, b) = (1f64.exp() / total, 2f64.exp() / total);
        let base = GateConfig { scale: 16.0, ..gate(4, 2, 1, 1, GateMethod::Greedy) };
        let weights = |rule| select(&GateConfig { rule, ..base.clone() }, &[], &logits, 1).unwrap().weights;
        close(&weights(WeightRule::Scaled).iter().map(|w| w / 16.0).collect::<Vec<_>>(), &[a as f32, b as f32]);
        close(&weights(WeightRule::Normalised), &[(a / (a + b)) as f32, (b / (a + b)) as f32]);
        let scaled: Vec<f32> = weights(WeightRule::NormalisedScaled).iter().map(|w| w / 16.0).collect();
        close(&scaled, &[(a / (a + b)) as f32, (b / (a + b)) as f32]);
    }

    #[test]
    fn bias_corrects_the_choice_and_not_the_weight() {
        let gate = GateConfig { scoring: Scoring::Sigmoid, ..gate(6, 2, 3, 2, GateMethod::NoauxTc) };
        // All biases negative: masked groups must still lose. Group sums of the two best: 0 → -1.0, 1 → -2.4, 2 → -1.2.
        let bias = [-1.0, -1.0, -1.0, -2.4, -1.0, -1.2];
        let choices = select(&gate, &bias, &[0.0; 6], 1).unwrap();
        assert_eq!(choices.experts, [0, 1]);
        close(&choices.weights, &[0.5, 0.5]);
        assert!(matches!(select(&gate, &[], &[0.0; 6], 1), Err(GateError::Bias { found: 0, expected: 6 })));
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let gate = gate(4, 2, 1, 1, GateMethod::Greedy);
        let mut logits = [0.0; 8];
        logits[6] = f32::NAN;
        let error = select(&gate, &[], &logits, 2).unwrap_err();
        assert_eq!(error.to_string(), "gate logits: found NaN at row 1, expert 2, expected a finite number");
        assert!(matches!(select(&gate, &[], &logits, 3), Err(GateError::Size { found: 8, rows: 3, experts: 4 })));
    }

    proptest! {
        #[test]
        fn a_row_stays_within_its_groups(logits in proptest::collection::vec(-20f32..20.0, 96), top_groups in 2usize..5) {
            let gate = gate(32, 6, 8, top_groups, GateMethod::GroupLimitedGreedy);
            let choices = select(&gate, &[], &logits, 3).unwrap();
            for row in 0..3 {
                let (experts, weights) = choices.row(row);
                prop_assert!(experts.windows(2).all(|w| w[0] < w[1]));
                let mut groups: Vec<u32> = experts.iter().map(|e| e / 4).collect();
                groups.dedup();
                prop_assert!(groups.len() <= top_groups);
                prop_assert!(weights.iter().all(|w| (0.0..=1.0).contains(w)));
                // Every kept expert is at least as good as every left one of the same groups.
                let worst = experts.iter().map(|e| logits[row * 32 + *e as usize]).fold(f32::MAX, f32::min);
                for &group in &groups {
                    for e in group * 4..group * 4 + 4 {
                        let left = !experts.contains(&e);
                        prop_assert!(!left || logits[row * 32 + e as usize] <= worst);
                    }
                }
            }
        }
    }
}
