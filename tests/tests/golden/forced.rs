//! A link that runs the experts that the reference chose, weighted by our own gate's probabilities.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_dispatch::{MoeLink, ShardLink};
use conclave_kernels::Device;
use conclave_proto::v1::{ExpertBatch, MoeInput, MoeOutput, WorkId};
use conclave_serve::Error;

use crate::{files::Sequence, system::System};

/// See above. The one shard holds all cells.
pub(crate) struct Forced {
    shard: Arc<dyn ShardLink>,
    experts: Vec<Vec<u32>>,
    groups: u32,
    top_k: usize,
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
            scale: config.routed_scaling_factor,
        }
    }

    fn batch(&self, input: &MoeInput) -> ExpertBatch {
        let choices = &self.experts[input.layer as usize];
        assert_eq!(choices.len(), input.rows as usize * self.top_k, "layer {}", input.layer);
        let weights = softmax_rows(&input.logits, input.experts as usize);
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
                batch.weights.extend(rows.iter().map(|row| weights[*row as usize][expert as usize] * self.scale));
                batch.row_index.extend(rows);
            }
        }
        batch
    }

    fn chosen<'a>(&self, choices: &'a [u32], row: u32) -> &'a [u32] {
        &choices[row as usize * self.top_k..(row as usize + 1) * self.top_k]
    }
}

fn softmax_rows(logits: &[u8], experts: usize) -> Vec<Vec<f32>> {
    let values: Vec<f32> = logits.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let row = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exp: Vec<f32> = row.iter().map(|z| (z - max).exp()).collect();
        let sum: f32 = exp.iter().sum();
        exp.into_iter().map(|e| e / sum).collect()
    };
    values.chunks_exact(experts).map(row).collect()
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
