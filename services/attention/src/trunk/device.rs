//! The trunk on a [`Device`].

use std::sync::Arc;

use conclave_kernels::{Device, MlaShape, RotaryTable, activation};
use conclave_model::{Checkpoint, ModelConfig, Progress, rotary};

use super::attention::{Attention, AttentionBuffers, LayerAttention, resize};
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
}

/// Weights and latent cache on a device.
pub struct DeviceTrunk<D: Device> {
    device: Arc<D>,
    shape: TrunkShape,
    eps: f32,
    attention: Attention,
    weights: TrunkWeights<D>,
    cache: D::Cache,
    step: Step,
}

/// The state of a step; `T` rows.
#[derive(Debug, Default)]
struct Step {
    rows: StepRows,
    /// The layer that the last segment ended at.
    layer: usize,
    x: Vec<f32>,      // [T, H], the residual stream
    normed: Vec<f32>, // [T, H]
    delta: Vec<f32>,  // [T, H], what a block adds to x
    shared: Vec<f32>, // [T, H]
    attention: AttentionBuffers,
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
        let config = checkpoint.config();
        let cache_bytes = u64::from(size.blocks) * block_bytes(&*device, config);
        checkpoint.check_memory(trunk_bytes(checkpoint) + cache_bytes)?;
        let weights = TrunkWeights::load(&*device, checkpoint, progress)?;
        let attention = attention(config, size.context_limit);
        let cache = device
            .new_cache(config.layers, size.blocks as usize, &attention.shape)
            .map_err(AttentionError::device("latent cache"))?;
        let shape = shape(&*device, config, size);
        Ok(Self { eps: config.rms_norm_eps, device, shape, attention, weights, cache, step: Step::default() })
    }

    /// Layers from `first` on, up to the next with routed experts or to the end.
    fn segment(&mut self, first: usize) -> Segment {
        for layer in first..self.weights.layers.len() {
            self.attention_block(layer);
            if let Some(rows) = self.ffn_block(layer) {
                self.step.layer = layer;
                return Segment::Moe(rows);
            }
        }
        Segment::End
    }

    /// x ← x + attention(norm(x))
    fn attention_block(&mut self, layer: usize) {
        let LayerWeights { attention_norm, attention: weights, .. } = &self.weights.layers[layer];
        let Step { rows, x, normed, delta, attention: buffers, .. } = &mut self.step;
        self.device.rms_norm(x, attention_norm, self.eps, normed);
        let mut at = LayerAttention { device: &*self.device, cache: &mut self.cache, layer, weights, rows };
        self.attention.run(&mut at, buffers, normed, delta);
        add(x, delta);
    }

    /// Dense: x ← x + ffn(norm(x)). With routed experts: what they take.
    fn ffn_block(&mut self, layer: usize) -> Option<MoeRows> {
        let LayerWeights { ffn_norm, ffn, .. } = &self.weights.layers[layer];
        let Step { rows, x, normed, delta, .. } = &mut self.step;
        self.device.rms_norm(x, ffn_norm, self.eps, normed);
        match ffn {
            LayerFfn::Dense(ffn) => {
                self.device.ffn(normed, ffn, delta);
                add(x, delta);
                None
            }
            LayerFfn::Moe { gate, .. } => {
                let mut logits = vec![0.0; rows.len() * self.shape.experts];
                self.device.gate_logits(normed, gate, &mut logits);
                let x = activation::encode(self.shape.activation, normed);
                Some(MoeRows { layer: layer as u32, x, logits })
            }
        }
    }
}

impl<D: Device> Trunk for DeviceTrunk<D> {
    fn shape(&self) -> &TrunkShape {
        &self.shape
    }

    fn begin(&mut self, rows: StepRows) -> Segment {
        self.step.fit(rows, self.shape.hidden);
        self.device.embed(&self.weights.embed, &self.step.rows.tokens, &mut self.step.x);
        self.segment(0)
    }

    fn shared_experts(&mut self) {
        let Step { normed, shared, layer, .. } = &mut self.step;
        match &self.weights.layers[*layer].ffn {
            LayerFfn::Moe { shared: Some(ffn), .. } => self.device.ffn(normed, ffn, shared),
            LayerFfn::Moe { shared: None, .. } | LayerFfn::Dense(_) => shared.fill(0.0),
        }
    }

    /// x ← x + (shared + routed), and on.
    fn resume(&mut self, routed: &[u8]) -> Segment {
        let Step { x, delta, shared, layer, .. } = &mut self.step;
        activation::decode_into(self.shape.activation, routed, delta);
        for ((x, shared), routed) in x.iter_mut().zip(shared).zip(delta) {
            *x += *shared + *routed;
        }
        let next = *layer + 1;
        self.segment(next)
    }

    fn logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) {
        let (hidden, step) = (self.shape.hidden, &mut self.step);
        resize(&mut step.normed, rows.len() * hidden);
        step.delta.clear();
        for row in rows {
            let start = *row as usize * hidden;
            step.delta.extend_from_slice(&step.x[start..start + hidden]);
        }
        self.device.rms_norm(&step.delta, &self.weights.norm, self.eps, &mut step.normed);
        resize(logits, rows.len() * self.shape.vocab);
        self.device.linear(&step.normed, &self.weights.lm_head, logits);
    }
}

impl Step {
    fn fit(&mut self, rows: StepRows, hidden: usize) {
        for buffer in [&mut self.x, &mut self.normed, &mut self.delta, &mut self.shared] {
            resize(buffer, rows.len() * hidden);
        }
        self.rows = rows;
    }
}

/// Bytes of a cache block over all layers.
pub(crate) fn block_bytes<D: Device>(device: &D, config: &ModelConfig) -> u64 {
    (config.layers * D::BLOCK * mla_shape(config).cached() * device.activation().size()) as u64
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
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

fn attention(config: &ModelConfig, context_limit: usize) -> Attention {
    let rotary = rotary(config);
    Attention {
        shape: mla_shape(config),
        rotary: RotaryTable::new(context_limit, &rotary.frequencies, rotary.factor),
        softmax_scale: rotary.softmax_scale,
    }
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
