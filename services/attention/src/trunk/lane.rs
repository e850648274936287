//! One step, or one micro-batch of a step, on its way through the trunk on a [`Device`].

use std::sync::Arc;

use conclave_kernels::{Device, KernelError, Mla, Published};

use super::attention::{AttentionBuffers, LayerAttention};
use super::{LayerFfn, LayerWeights, MoeRows, Segment, StepRows, TrunkWeights};

/// Weights and latent cache on a device: what all lanes share.
pub(super) struct Parts<D: Device> {
    pub(super) device: Arc<D>,
    pub(super) eps: f32,
    pub(super) mla: Mla<D::Rotary>,
    pub(super) weights: TrunkWeights<D>,
    pub(super) cache: D::Cache,
}

/// The rows under way in one lane, and their state on the device.
pub(super) struct Lane<D: Device> {
    /// Tells its pieces of work from those of other lanes.
    index: usize,
    batch: D::Batch,
    pub(super) rows: usize,
    /// The layer that the last segment ended at.
    layer: usize,
    /// What the routed experts of that layer take; `None`: it ended at the end.
    fetched: Option<(D::Fetched, Option<Published>)>,
    pub(super) buffers: Buffers<D::Buffer>,
    attention: AttentionBuffers<D::Buffer>,
}

/// The state of the rows on the device; `T` rows.
#[derive(Debug, Default)]
pub(super) struct Buffers<B> {
    pub(super) x: B, // [T, H], the residual stream
    normed: B,       // [T, H]
    delta: B,        // [T, H], what a block adds to x
    shared: B,       // [T, H]
    logits: B,       // [T, E]
}

impl<D: Device> Lane<D> {
    pub(super) fn new(index: usize) -> Self {
        Self {
            index,
            batch: D::Batch::default(),
            rows: 0,
            layer: 0,
            fetched: None,
            buffers: Buffers::default(),
            attention: AttentionBuffers::default(),
        }
    }

    /// Starts the first segment of these rows.
    pub(super) fn begin(&mut self, on: &mut Parts<D>, rows: StepRows) {
        self.rows = rows.len();
        on.device.load_batch(rows, &mut self.batch);
        on.device.embed(&on.weights.embed, &self.batch, &mut self.buffers.x);
        self.segment(on, 0);
    }

    /// x ← x + (shared + routed), and the next segment.
    pub(super) fn resume(&mut self, on: &mut Parts<D>, routed: &[u8]) {
        let Buffers { x, delta, shared, .. } = &mut self.buffers;
        on.device.decode(routed, delta);
        match &on.weights.layers[self.layer].ffn {
            LayerFfn::Moe { shared: Some(_), .. } => on.device.add_two(x, shared, delta),
            LayerFfn::Moe { shared: None, .. } | LayerFfn::Dense(_) => on.device.add(x, delta),
        }
        self.segment(on, self.layer + 1);
    }

    /// Waits for the segment that was started last.
    pub(super) fn finish(&mut self, on: &Parts<D>) -> Result<Segment, KernelError> {
        let Some((fetched, published)) = self.fetched.take() else { return Ok(Segment::End) };
        let (x, logits) = on.device.take(fetched)?;
        Ok(Segment::Moe(MoeRows { layer: self.layer as u32, x, logits, published }))
    }

    pub(super) fn shared_experts(&mut self, on: &Parts<D>) {
        if !D::QUEUES {
            self.run_shared(on);
        }
    }

    fn run_shared(&mut self, on: &Parts<D>) {
        if let LayerFfn::Moe { shared: Some(ffn), .. } = &on.weights.layers[self.layer].ffn {
            on.device.ffn(&self.buffers.normed, ffn, &mut self.buffers.shared);
        }
    }

    /// Layers from `first` on, up to the next with routed experts or to the end. A device that queues goes on with the shared
    /// experts while the host sees to the routed ones.
    fn segment(&mut self, on: &mut Parts<D>, first: usize) {
        let layers = on.weights.layers.len();
        for layer in first..layers {
            self.layer = layer;
            self.attention_block(on, layer);
            if self.ffn_block(on, layer) {
                let published = on.device.publish(&self.buffers.normed);
                on.device.submit(self.piece(layers, layer, 0));
                let fetched = on.device.fetch(&self.buffers.normed, &mut self.buffers.logits);
                self.fetched = Some((fetched, published));
                if D::QUEUES {
                    self.run_shared(on);
                    on.device.submit(self.piece(layers, layer, 1));
                }
                return;
            }
        }
        self.fetched = None;
        on.device.submit(self.piece(layers, layers, 0));
    }

    /// Names work that comes again in every step: a segment that ends at a layer, and the shared experts there.
    fn piece(&self, layers: usize, layer: usize, part: usize) -> u32 {
        ((self.index * (layers + 1) + layer) * 2 + part) as u32
    }

    /// x ← x + attention(norm(x))
    fn attention_block(&mut self, on: &mut Parts<D>, layer: usize) {
        let Parts { device, eps, mla, weights, cache } = on;
        let LayerWeights { attention_norm, attention: weights, .. } = &weights.layers[layer];
        let (batch, Buffers { x, normed, delta, .. }) = (&self.batch, &mut self.buffers);
        device.rms_norm(x, attention_norm, *eps, normed);
        LayerAttention { device: &**device, mla, cache, layer, weights, batch }.run(&mut self.attention, normed, delta);
        device.add(x, delta);
    }

    /// Dense: x ← x + ffn(norm(x)). With routed experts (then true): what they take.
    fn ffn_block(&mut self, on: &Parts<D>, layer: usize) -> bool {
        let Parts { device, eps, weights, .. } = on;
        let LayerWeights { ffn_norm, ffn, .. } = &weights.layers[layer];
        let Buffers { x, normed, delta, logits, .. } = &mut self.buffers;
        device.rms_norm(x, ffn_norm, *eps, normed);
        match ffn {
            LayerFfn::Dense(ffn) => {
                device.ffn(normed, ffn, delta);
                device.add(x, delta);
                false
            }
            LayerFfn::Moe { gate, .. } => {
                device.gate_logits(normed, gate, logits);
                true
            }
        }
    }
}
