//! The attention block of one layer: from the normed input to what is added to the residual (MODEL §3.2–3.5).

use conclave_kernels::{Device, LatentWrite, MlaShape, RotaryTable};

use super::{AttentionWeights, QueryWeights, StepRows};

/// Of the two latent norms, whatever the config says for the others.
const LATENT_EPS: f32 = 1e-6;

/// What all layers share.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) shape: MlaShape,
    pub(super) rotary: RotaryTable,
    pub(super) softmax_scale: f32,
}

/// Buffers, reused by all layers; `T` rows.
#[derive(Debug, Default)]
pub(super) struct AttentionBuffers {
    q_latent: Vec<f32>, // [T, rq]
    q_normed: Vec<f32>, // [T, rq]
    q: Vec<f32>,        // [T, n, dn + dr]
    absorbed: Vec<f32>, // [T, n, r + dr]
    kv: Vec<f32>,       // [T, r + dr]
    o_latent: Vec<f32>, // [T, n, r]
    o: Vec<f32>,        // [T, n, dv]
}

/// Where a layer's attention happens.
pub(super) struct LayerAttention<'a, D: Device> {
    pub(super) device: &'a D,
    pub(super) cache: &'a mut D::Cache,
    pub(super) layer: usize,
    pub(super) weights: &'a AttentionWeights<D::Matrix>,
    pub(super) rows: &'a StepRows,
}

impl Attention {
    /// `y [T, H]` from the normed input `x [T, H]`; writes the rows' latents into the cache first.
    pub(super) fn run<D: Device>(
        &self,
        at: &mut LayerAttention<'_, D>,
        buffers: &mut AttentionBuffers,
        x: &[f32],
        y: &mut [f32],
    ) {
        buffers.fit(&self.shape, at.rows.len());
        self.project(at, buffers, x);
        self.write_latents(at, &buffers.kv);
        self.attend(at, buffers);
        at.device.linear(&buffers.o, &at.weights.out, y);
    }

    /// Queries, latents and keys.
    fn project<D: Device>(&self, at: &LayerAttention<'_, D>, buffers: &mut AttentionBuffers, x: &[f32]) {
        match &at.weights.query {
            QueryWeights::Direct(weight) => at.device.linear(x, weight, &mut buffers.q),
            QueryWeights::LowRank { a, norm, b } => {
                resize(&mut buffers.q_latent, at.rows.len() * norm.len());
                resize(&mut buffers.q_normed, at.rows.len() * norm.len());
                at.device.linear(x, a, &mut buffers.q_latent);
                at.device.rms_norm(&buffers.q_latent, norm, LATENT_EPS, &mut buffers.q_normed);
                at.device.linear(&buffers.q_normed, b, &mut buffers.q);
            }
        }
        at.device.linear(x, &at.weights.kv_a, &mut buffers.kv);
    }

    fn write_latents<D: Device>(&self, at: &mut LayerAttention<'_, D>, kv: &[f32]) {
        let write = LatentWrite {
            kv,
            gain: &at.weights.kv_norm,
            rotary: &self.rotary,
            positions: &at.rows.positions,
            slots: &at.rows.slots,
        };
        at.device.write_latents(at.cache, at.layer, &write);
    }

    /// Absorbed attention over the cache.
    fn attend<D: Device>(&self, at: &LayerAttention<'_, D>, buffers: &mut AttentionBuffers) {
        let AttentionBuffers { q, absorbed, o_latent, o, .. } = buffers;
        at.device.mla_queries(&self.shape, q, &at.weights.uk, &self.rotary, &at.rows.positions, absorbed);
        at.device.mla_attention(at.cache, at.layer, absorbed, &at.rows.sequences(), self.softmax_scale, o_latent);
        at.device.mla_values(&self.shape, o_latent, &at.weights.uv, o);
    }
}

impl AttentionBuffers {
    fn fit(&mut self, shape: &MlaShape, rows: usize) {
        resize(&mut self.q, rows * shape.heads * (shape.nope + shape.rope));
        resize(&mut self.absorbed, rows * shape.heads * shape.cached());
        resize(&mut self.kv, rows * shape.cached());
        resize(&mut self.o_latent, rows * shape.heads * shape.latent);
        resize(&mut self.o, rows * shape.heads * shape.value);
    }
}

/// Makes a buffer exactly `len` long; its content is to be overwritten.
pub(super) fn resize(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}
