//! A link that runs the experts that the reference chose, weighted by our own gate's probabilities.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_dispatch::{MoeLink, ShardLink};
use conclave_kernels::Device;
use conclave_model::Scoring;
use conclave_proto::v1::{ExpertBatch, MoeInput, MoeOutput, WorkId};
use conclave_serve::Error;

use crate::{files::Sequence, system::System};

/// See above. The one shard holds all cells.
pub(crate) struct Forced {
    shard: Arc<dyn ShardLink>,
    experts: Vec<Vec<u32>>,
    groups: u32,
    top_k: usize,
    weight: Weight,
}

/// How gate logits of the chosen experts become weights.
#[derive(Clone, Copy)]
struct Weight {
    sigmoid: bool,
    normalised: bool,
    scale: f32,
}

impl Forced {
    /// For one sequence, to be run in one chunk.
    pub(crate) fn new<D: Device>(system: &System<D>, sequence: &Sequence) -> Self {
        let config = system.checkpoint().config();
        Self {
            shard: system.shard(),
            experts: sequence.experts.clone(),
            groups: u32::try_from(config.cell_groups()).unwrap(),
            top_k: config.experts_per_token,
            weight: Weight {
                sigmoid: config.scoring == Scoring::Sigmoid,
                normalised: config.norm_topk_prob,
                scale: config.routed_scaling_factor,
            },
        }
    }

    fn batch(&self, input: &MoeInput) -> ExpertBatch {
        let choices = &self.experts[input.layer as usize];
        assert_eq!(choices.len(), input.rows as usize * self.top_k, "layer {}", input.layer);
        let weights = self.weights(choices, &input.logits, input.experts as usize);
        let mut batch = ExpertBatch {
            id: Some(WorkId { caller: input.caller, step: input.step, layer: input.layer, attempt: 0, part: 0 }),
            activation: input.activation,
            rows: input.rows,
            hidden: input.hidden,
            x: input.x.clone(),
            groups: (0..self.groups).collect(),
            ..ExpertBatch::default()
        };
        for expert in 0..input.experts {
            let rows: Vec<u32> = (0..input.rows).filter(|row| self.chosen(choices, *row).contains(&expert)).collect();
            if !rows.is_empty() {
                batch.experts.push(expert);
                batch.counts.push(rows.len() as u32);
                batch.weights.extend(rows.iter().map(|row| weights[*row as usize][expert as usize]));
                batch.row_index.extend(rows);
            }
        }
        batch
    }

    /// `[T][E]`, of which those of the chosen experts count.
    fn weights(&self, choices: &[u32], logits: &[u8], experts: usize) -> Vec<Vec<f32>> {
        let Weight { sigmoid, normalised, scale } = self.weight;
        let mut rows = rows_of(logits, experts);
        for (row, scores) in (0..).zip(&mut rows) {
            if sigmoid {
                scores.iter_mut().for_each(|z| *z = 1.0 / (1.0 + (-*z).exp()));
            } else {
                softmax(scores);
            }
            let sum: f32 = self.chosen(choices, row).iter().map(|expert| scores[*expert as usize]).sum();
            scores.iter_mut().for_each(|score| *score *= if normalised { scale / sum } else { scale });
        }
        rows
    }

    fn chosen<'a>(&self, choices: &'a [u32], row: u32) -> &'a [u32] {
        &choices[row as usize * self.top_k..(row as usize + 1) * self.top_k]
    }
}

fn rows_of(logits: &[u8], experts: usize) -> Vec<Vec<f32>> {
    let values: Vec<f32> = logits.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    values.chunks_exact(experts).map(<[f32]>::to_vec).collect()
}

fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|z| *z = (*z - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|e| *e /= sum);
}

#[async_trait]
impl MoeLink for Forced {
    async fn moe(&self, input: MoeInput) -> Result<MoeOutput, Error> {
        let result = self.shard.compute(self.batch(&input)).await.unwrap();
        assert!(result.error.is_none(), "{:?}", result.error);
        assert_eq!(result.sums.len(), 1, "one shard holds the whole tree");
        assert_eq!(result.sums[0].row_index.len(), input.rows as usize);
        Ok(MoeOutput {
            step: input.step,
            layer: input.layer,
            attempt: input.attempt,
            activation: input.activation,
            routed: result.sums[0].sum.clone(),
            ..MoeOutput::default()
        })
    }
}
