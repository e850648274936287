//! The trunk on a [`Device`].

use std::sync::Arc;

use conclave_kernels::{Device, FoundToken, KernelError, Mla, MlaShape, Pool, RotaryTable, TokenAsk};
use conclave_model::{Checkpoint, ModelConfig, ModelError, Progress, rotary};

use super::lane::{Lane, Parts};
use super::weights::trunk_bytes;
use super::{LANES, Segment, StepRows, Trunk, TrunkShape, TrunkWeights};
use crate::AttentionError;

/// How much a trunk is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrunkSize {
    /// Cache blocks.
    pub blocks: u32,
    /// Longest sequence.
    pub context_limit: usize,
    /// Whether bits must not depend on how rows come together: no keys and values are expanded.
    pub exact: bool,
}

impl TrunkSize {
    /// Whether a trunk of this size can be had.
    ///
    /// # Errors
    /// When memory does not suffice, or the device cannot expand keys and values and is to.
    pub(crate) fn check<D: Device>(&self, device: &D, checkpoint: &Checkpoint) -> Result<(), AttentionError> {
        if !self.exact && !device.expands() {
            return Err(AttentionError::NotExpanding { device: device.numerics() });
        }
        let weights = trunk_bytes(checkpoint, self.exact, device.fp8_weights());
        checkpoint.check_memory(weights)?;
        let cache = u64::from(self.blocks) * block_bytes(device, checkpoint.config());
        checkpoint.check_memory(weights + cache).map_err(|error| cache_refusal(error, weights, cache))
    }
}

/// What does not fit is the cache where the weights would, both in bytes.
fn cache_refusal(error: ModelError, weights: u64, cache: u64) -> AttentionError {
    match error {
        ModelError::WeightsDoNotFit { available, limited_by, .. } => {
            let left = available.saturating_sub(weights);
            let expected = format!("at most {left}, which are left beside the trunk's {weights} ({limited_by})");
            AttentionError::config("cache", format!("{cache} bytes"), expected)
        }
        error => error.into(),
    }
}

/// Weights, latent cache and the rows under way on a device.
pub struct DeviceTrunk<D: Device> {
    shape: TrunkShape,
    exact: bool,
    parts: Parts<D>,
    lanes: [Lane<D>; LANES],
    last: LastRows<D::Buffer>,
}

/// From the residual of some rows to their logits; `R` rows.
#[derive(Debug, Default)]
struct LastRows<B> {
    x: B,      // [R, H]
    normed: B, // [R, H]
    logits: B, // [R, vocab]
}

impl<D: Device> DeviceTrunk<D> {
    /// Loads the trunk's weights into the device and makes its cache.
    ///
    /// # Errors
    /// When memory does not suffice or a tensor is refused.
    pub fn load(
        device: Arc<D>,
        checkpoint: &Checkpoint,
        size: TrunkSize,
        progress: &Progress,
    ) -> Result<Self, AttentionError> {
        size.check(&*device, checkpoint)?;
        if !size.exact {
            device.relax();
        }
        let config = checkpoint.config();
        let weights = TrunkWeights::load(&*device, checkpoint, size.exact, progress)?;
        let mla = mla(&*device, config, size.context_limit).map_err(AttentionError::device("rotary table"))?;
        let cache = device
            .new_cache(config.layers, size.blocks as usize, &mla.shape)
            .map_err(AttentionError::device("latent cache"))?;
        Ok(Self {
            exact: size.exact,
            shape: shape(&*device, config, size),
            parts: Parts { device, eps: config.rms_norm_eps, mla, weights, cache },
            lanes: std::array::from_fn(Lane::new),
            last: LastRows { x: D::Buffer::default(), normed: D::Buffer::default(), logits: D::Buffer::default() },
        })
    }

    /// The logits of some rows, into their buffer.
    fn project(&mut self, rows: &[u32]) {
        let Parts { device, eps, weights, .. } = &self.parts;
        let LastRows { x, normed, logits } = &mut self.last;
        let of_lanes = by_lane(rows, &self.lanes.each_ref().map(|lane| lane.rows));
        let parts: Vec<(&D::Buffer, &[u32])> =
            self.lanes.iter().zip(&of_lanes).map(|(lane, rows)| (&lane.buffers.x, &rows[..])).collect();
        device.gather(&parts, self.shape.hidden, x);
        device.rms_norm(x, &weights.norm, *eps, normed);
        device.linear(normed, &weights.lm_head, logits);
    }
}

impl<D: Device> Trunk for DeviceTrunk<D> {
    fn shape(&self) -> &TrunkShape {
        &self.shape
    }

    fn queues(&self) -> bool {
        D::QUEUES
    }

    fn begin(&mut self, lane: usize, mut rows: StepRows) {
        if !self.exact {
            rows.expand();
        }
        self.lanes[lane + 1..].iter_mut().for_each(|behind| behind.rows = 0);
        self.lanes[lane].begin(&mut self.parts, rows);
    }

    fn finish(&mut self, lane: usize) -> Result<Segment, KernelError> {
        self.lanes[lane].finish(&self.parts)
    }

    fn shared_experts(&mut self, lane: usize) {
        self.lanes[lane].shared_experts(&self.parts);
    }

    fn resume(&mut self, lane: usize, routed: &[u8]) {
        self.lanes[lane].resume(&mut self.parts, routed);
    }

    fn logits(&mut self, rows: &[u32], values: &mut Vec<f32>) -> Result<(), KernelError> {
        self.project(rows);
        self.parts.device.read(&mut self.last.logits, values)
    }

    fn pool(&self) -> Option<&Pool> {
        self.parts.device.pool()
    }

    fn finds_tokens(&self) -> bool {
        self.parts.device.finds_tokens(self.shape.vocab)
    }

    fn find_tokens(
        &mut self,
        rows: &[u32],
        mask: &[u64],
        asks: &[TokenAsk<'_>],
    ) -> Result<Vec<Option<FoundToken>>, KernelError> {
        self.project(rows);
        self.parts.device.find_tokens(&mut self.last.logits, mask, asks)
    }
}

/// The rows of each lane, by their number there, when lanes have so many rows and `rows` ascend.
fn by_lane(rows: &[u32], counts: &[usize; LANES]) -> [Vec<u32>; LANES] {
    let (mut first, mut rest) = (0, rows);
    counts.map(|count| {
        let (here, behind) = rest.split_at(rest.partition_point(|row| *row < first + count as u32));
        let here = here.iter().map(|row| row - first).collect();
        (first, rest) = (first + count as u32, behind);
        here
    })
}

/// Bytes of a cache block over all layers.
pub(crate) fn block_bytes<D: Device>(device: &D, config: &ModelConfig) -> u64 {
    (config.layers * D::BLOCK * mla_shape(config).cached() * device.activation().size()) as u64
}

fn mla_shape(config: &ModelConfig) -> MlaShape {
    MlaShape {
        heads: config.heads,
        nope: config.qk_nope,
        rope: config.qk_rope,
        value: config.v_head,
        latent: config.kv_lora_rank,
    }
}

fn mla<D: Device>(device: &D, config: &ModelConfig, context_limit: usize) -> Result<Mla<D::Rotary>, KernelError> {
    let rotary = rotary(config);
    let table = RotaryTable::new(context_limit, &rotary.frequencies, rotary.factor);
    Ok(Mla { shape: mla_shape(config), rotary: device.load_rotary(table)?, scale: rotary.softmax_scale })
}

fn shape<D: Device>(device: &D, config: &ModelConfig, size: TrunkSize) -> TrunkShape {
    TrunkShape {
        vocab: config.vocab,
        hidden: config.hidden,
        experts: config.routed_experts.unwrap_or(0),
        activation: device.activation(),
        block: D::BLOCK,
        blocks: size.blocks,
        context_limit: size.context_limit,
        numerics: device.numerics(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_step_are_found_in_its_lanes() {
        assert_eq!(by_lane(&[0, 2, 3, 6], &[3, 4]), [vec![0, 2], vec![0, 3]]);
        assert_eq!(by_lane(&[4], &[3, 4]), [vec![], vec![1]]);
        assert_eq!(by_lane(&[1, 2], &[3, 0]), [vec![1, 2], vec![]]);
    }

    #[test]
    fn what_does_not_fit_beside_the_weights_is_the_cache() {
        let error = ModelError::WeightsDoNotFit { needed: 130, available: 100, limited_by: "MemAvailable".to_owned() };
        assert_eq!(
            cache_refusal(error, 30, 100).to_string(),
            "cache: found 100 bytes, expected at most 70, which are left beside the trunk's 30 (MemAvailable)"
        );
    }
}
