//! The attention block of one layer: from the normed input to what is added to the residual (MODEL §3.2–3.5).

use conclave_kernels::{Device, LatentWrite, Mla};

use super::{AttentionWeights, QueryWeights};

/// Of the two latent norms, whatever the config says for the others.
const LATENT_EPS: f32 = 1e-6;

/// Buffers, reused by all layers; `T` rows.
#[derive(Debug, Default)]
pub(super) struct AttentionBuffers<B> {
    q_latent: B, // [T, rq]
    q_normed: B, // [T, rq]
    q: B,        // [T, n, dn + dr]
    absorbed: B, // [T, n, r + dr]
    kv: B,       // [T, r + dr]
    o_latent: B, // [T, n, r]
    o: B,        // [T, n, dv]
}

/// Where a layer's attention happens.
pub(super) struct LayerAttention<'a, D: Device> {
    pub(super) device: &'a D,
    pub(super) mla: &'a Mla<D::Rotary>,
    pub(super) cache: &'a mut D::Cache,
    pub(super) layer: usize,
    pub(super) weights: &'a AttentionWeights<D>,
    pub(super) batch: &'a D::Batch,
}

impl<D: Device> LayerAttention<'_, D> {
    /// `y [T, H]` from the normed input `x [T, H]`; writes the rows' latents into the cache first.
    pub(super) fn run(&mut self, buffers: &mut AttentionBuffers<D::Buffer>, x: &D::Buffer, y: &mut D::Buffer) {
        self.project(buffers, x);
        let write = LatentWrite { layer: self.layer, kv: &buffers.kv, gain: &self.weights.kv_norm };
        self.device.write_latents(self.mla, self.batch, &write, self.cache);
        self.attend(buffers);
        self.device.linear(&buffers.o, &self.weights.out, y);
    }

    /// Queries, latents and keys.
    fn project(&self, buffers: &mut AttentionBuffers<D::Buffer>, x: &D::Buffer) {
        match &self.weights.query {
            QueryWeights::Direct(weight) => self.device.linear(x, weight, &mut buffers.q),
            QueryWeights::LowRank { a, norm, b } => {
                self.device.linear(x, a, &mut buffers.q_latent);
                self.device.rms_norm(&buffers.q_latent, norm, LATENT_EPS, &mut buffers.q_normed);
                self.device.linear(&buffers.q_normed, b, &mut buffers.q);
            }
        }
        self.device.linear(x, &self.weights.kv_a, &mut buffers.kv);
    }

    /// Attention over the cache: absorbed, and for the spans that are expanded not.
    fn attend(&self, buffers: &mut AttentionBuffers<D::Buffer>) {
        let Self { device, mla, batch, weights, .. } = self;
        let AttentionBuffers { q, absorbed, o_latent, o, .. } = buffers;
        device.mla_queries(mla, batch, q, &weights.uk, absorbed);
        device.mla_attention(mla, batch, (&*self.cache, self.layer), absorbed, o_latent);
        device.mla_values(mla, batch, o_latent, &weights.uv, o);
        if let Some(kv_b) = &weights.kv_b {
            device.mla_expanded(mla, batch, (&*self.cache, self.layer), q, kv_b, o);
        }
    }
}
