//! The trunk on a [`Device`].

use std::sync::Arc;

use conclave_kernels::{Device, KernelError, Mla, MlaShape, RotaryTable};
use conclave_model::{Checkpoint, ModelConfig, ModelError, Progress, rotary};

use super::attention::{AttentionBuffers, LayerAttention};
use super::weights::trunk_bytes;
use super::{LayerFfn, LayerWeights, MoeRows, Segment, StepRows, Trunk, TrunkShape, TrunkWeights};
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
        let weights = trunk_bytes(checkpoint, self.exact);
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

/// Weights and latent cache on a device.
pub struct DeviceTrunk<D: Device> {
    device: Arc<D>,
    shape: TrunkShape,
    eps: f32,
    exact: bool,
    mla: Mla<D::Rotary>,
    weights: TrunkWeights<D>,
    cache: D::Cache,
    batch: D::Batch,
    /// The layer that the last segment ended at.
    layer: usize,
    buffers: Buffers<D::Buffer>,
    attention: AttentionBuffers<D::Buffer>,
}

/// The state of a step on the device; `T` rows.
#[derive(Debug, Default)]
struct Buffers<B> {
    x: B,      // [T, H], the residual stream
    normed: B, // [T, H]
    delta: B,  // [T, H], what a block adds to x
    shared: B, // [T, H]
    logits: B, // [T, E] at a gate, [R, vocab] in the end
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
        let config = checkpoint.config();
        let weights = TrunkWeights::load(&*device, checkpoint, size.exact, progress)?;
        let mla = mla(&*device, config, size.context_limit).map_err(AttentionError::device("rotary table"))?;
        let cache = device
            .new_cache(config.layers, size.blocks as usize, &mla.shape)
            .map_err(AttentionError::device("latent cache"))?;
        Ok(Self {
            eps: config.rms_norm_eps,
            exact: size.exact,
            shape: shape(&*device, config, size),
            device,
            mla,
            weights,
            cache,
            batch: D::Batch::default(),
            layer: 0,
            buffers: Buffers::default(),
            attention: AttentionBuffers::default(),
        })
    }

    /// Layers from `first` on, up to the next with routed experts or to the end.
    fn segment(&mut self, first: usize) -> Result<Segment, KernelError> {
        for layer in first..self.weights.layers.len() {
            self.attention_block(layer);
            if let Some(rows) = self.ffn_block(layer)? {
                self.layer = layer;
                return Ok(Segment::Moe(rows));
            }
        }
        Ok(Segment::End)
    }

    /// x ← x + attention(norm(x))
    fn attention_block(&mut self, layer: usize) {
        let LayerWeights { attention_norm, attention: weights, .. } = &self.weights.layers[layer];
        let Self { device, mla, cache, batch, buffers: Buffers { x, normed, delta, .. }, .. } = self;
        device.rms_norm(x, attention_norm, self.eps, normed);
        LayerAttention { device: &**device, mla, cache, layer, weights, batch }.run(&mut self.attention, normed, delta);
        device.add(x, delta);
    }

    /// Dense: x ← x + ffn(norm(x)). With routed experts: what they take.
    fn ffn_block(&mut self, layer: usize) -> Result<Option<MoeRows>, KernelError> {
        let LayerWeights { ffn_norm, ffn, .. } = &self.weights.layers[layer];
        let Self { device, buffers: Buffers { x, normed, delta, logits: gate_logits, .. }, .. } = self;
        device.rms_norm(x, ffn_norm, self.eps, normed);
        match ffn {
            LayerFfn::Dense(ffn) => {
                device.ffn(normed, ffn, delta);
                device.add(x, delta);
                Ok(None)
            }
            LayerFfn::Moe { gate, .. } => {
                device.gate_logits(normed, gate, gate_logits);
                let published = device.publish(normed);
                let (x, mut logits) = (device.encode(normed)?, Vec::new());
                device.read(gate_logits, &mut logits)?;
                Ok(Some(MoeRows { layer: layer as u32, x, logits, published }))
            }
        }
    }
}

impl<D: Device> Trunk for DeviceTrunk<D> {
    fn shape(&self) -> &TrunkShape {
        &self.shape
    }

    fn begin(&mut self, mut rows: StepRows) -> Result<Segment, KernelError> {
        if !self.exact {
            rows.expand();
        }
        self.device.load_batch(rows, &mut self.batch);
        self.device.embed(&self.weights.embed, &self.batch, &mut self.buffers.x);
        self.segment(0)
    }

    fn shared_experts(&mut self) {
        if let LayerFfn::Moe { shared: Some(ffn), .. } = &self.weights.layers[self.layer].ffn {
            self.device.ffn(&self.buffers.normed, ffn, &mut self.buffers.shared);
        }
    }

    /// x ← x + (shared + routed), and on.
    fn resume(&mut self, routed: &[u8]) -> Result<Segment, KernelError> {
        let Buffers { x, delta, shared, .. } = &mut self.buffers;
        self.device.decode(routed, delta);
        match &self.weights.layers[self.layer].ffn {
            LayerFfn::Moe { shared: Some(_), .. } => self.device.add_two(x, shared, delta),
            LayerFfn::Moe { shared: None, .. } | LayerFfn::Dense(_) => self.device.add(x, delta),
        }
        self.segment(self.layer + 1)
    }

    fn logits(&mut self, rows: &[u32], values: &mut Vec<f32>) -> Result<(), KernelError> {
        let Buffers { x, normed, delta, logits, .. } = &mut self.buffers;
        self.device.gather(x, self.shape.hidden, rows, delta);
        self.device.rms_norm(delta, &self.weights.norm, self.eps, normed);
        self.device.linear(normed, &self.weights.lm_head, logits);
        self.device.read(logits, values)
    }
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
    fn what_does_not_fit_beside_the_weights_is_the_cache() {
        let error = ModelError::WeightsDoNotFit { needed: 130, available: 100, limited_by: "MemAvailable".to_owned() };
        assert_eq!(
            cache_refusal(error, 30, 100).to_string(),
            "cache: found 100 bytes, expected at most 70, which are left beside the trunk's 30 (MemAvailable)"
        );
    }
}
