//! The least that a figure can be on a machine: what has to be read at its read bandwidth, what has to be multiplied at
//! its peak, whichever takes longer (MODEL §9).
//!
//! What is counted:
//! - **Bytes**: each weight matrix that a step (or a prompt) needs, once, in the type that the device keeps it in: of the
//!   trunk all but the embedding, lm_head, and of the routed experts as many as are expected to be chosen at least once
//!   if every token chose uniformly. The embedding counts with its rows, the latent cache with the positions that are
//!   attended to. Activations are not counted: they stay in caches.
//! - **Operations**: two for each multiply-add of the matrices that a token passes, lm_head for the tokens that are
//!   sampled, and the attention core: at decode the absorbed form over the latents, which are all that is cached; for a
//!   prompt the expanded form, which has the fewest operations (MODEL §9), although the device may use the absorbed one.
//!   Norms, rotary embedding, softmax and activation functions are not counted.
//!
//! What is used by every token may stay in a large last-level cache; the limit does not know of that.

use conclave_kernels::{Dtype, Fp8Weights};
use conclave_model::{
    Checkpoint, ModelConfig,
    sizes::{Part, Sizes},
};
use serde::Serialize;

/// What has to be done at least.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// To be read.
    pub bytes: f64,
    /// A multiply-add is two.
    pub flops: f64,
}

/// What a machine can do at most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Bytes read a second.
    pub read: f64,
    /// Operations a second.
    pub flops: f64,
}

impl Rates {
    /// The shortest time for some work, in seconds.
    pub fn seconds(&self, work: Work) -> f64 {
        (work.bytes / self.read).max(work.flops / self.flops)
    }

    /// Between two of them.
    pub fn between(self, other: Self) -> Self {
        Self { read: f64::midpoint(self.read, other.read), flops: f64::midpoint(self.flops, other.flops) }
    }
}

/// What a model costs.
#[derive(Debug, Clone)]
pub struct Costs {
    config: ModelConfig,
    sizes: Sizes,
    /// Of each part's weights, as the device keeps them.
    part_bytes: [f64; Part::ALL.len()],
    latent: Dtype,
}

impl Costs {
    /// Of a model with weights and latents of these types.
    pub fn new(config: &ModelConfig, weight: Dtype, latent: Dtype) -> Self {
        let sizes = Sizes::of(config);
        let part_bytes = Part::ALL.map(|part| sizes.part_bytes(part, weight) as f64);
        Self { config: config.clone(), sizes, part_bytes, latent }
    }

    /// Of a checkpoint on the device with this numerics id: the reference device keeps weights as stored (those in FP8 in f32) and
    /// latents in f32, all others have bf16 for both, and keep matrices in FP8 as they are.
    pub fn on(checkpoint: &Checkpoint, numerics: &str) -> Self {
        let stored = || checkpoint.tensors().find(|tensor| tensor.part == Part::LmHead).map(|tensor| tensor.dtype);
        if numerics.starts_with("reference") {
            return Self::new(checkpoint.config(), stored().unwrap_or(Dtype::F32), Dtype::F32);
        }
        let costs = Self::new(checkpoint.config(), Dtype::Bf16, Dtype::Bf16);
        let mut part_bytes = [0.0; Part::ALL.len()];
        for tensor in checkpoint.tensors() {
            let elements = tensor.shape.iter().product::<usize>();
            let bf16 = (elements * Dtype::Bf16.size()) as u64;
            let kept = tensor.is_fp8 || tensor.is_scales;
            let of_fp8 = || checkpoint.loaded_bytes_of(tensor.name, Fp8Weights::Kept);
            part_bytes[tensor.part as usize] += kept.then(of_fp8).flatten().unwrap_or(bf16) as f64;
        }
        Self { part_bytes, ..costs }
    }

    /// One step that draws a token for each of `streams` sequences of `context` tokens.
    pub fn decode_step(&self, streams: usize, context: f64) -> Work {
        let rows = streams as f64;
        let latents = rows * context * self.sizes.latent_bytes(self.latent) as f64;
        let per_token = self.sizes.activated - self.sizes.part(Part::Embed);
        Work {
            bytes: self.trunk() + self.routed(streams) + rows * self.row() + latents,
            flops: 2.0 * rows * per_token as f64 + rows * context * self.absorbed(),
        }
    }

    /// A prompt of `tokens`, each weight read once, and its first token drawn.
    pub fn prefill(&self, tokens: usize) -> Work {
        let rows = tokens as f64;
        let per_token = self.sizes.activated - self.sizes.part(Part::Embed) - self.sizes.part(Part::LmHead);
        let pairs = rows * (rows + 1.0) / 2.0;
        let flops = 2.0 * rows * per_token as f64 + 2.0 * self.sizes.part(Part::LmHead) as f64;
        Work { bytes: self.trunk() + self.routed(tokens) + rows * self.row(), flops: flops + pairs * self.expanded() }
    }

    /// The routed experts of one layer for one token.
    pub fn layer_call(&self) -> Work {
        let chosen = self.config.experts_per_token as f64;
        Work { bytes: chosen * self.expert(), flops: 2.0 * chosen * self.sizes.expert as f64 }
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Element type of what goes to the routed experts: that of the latents.
    pub fn activation(&self) -> Dtype {
        self.latent
    }

    /// Bytes of all weights.
    pub fn total_bytes(&self) -> f64 {
        self.part_bytes.iter().sum()
    }

    /// Bytes that every step reads.
    fn trunk(&self) -> f64 {
        self.total_bytes() - self.part_bytes[Part::Embed as usize] - self.part_bytes[Part::Routed as usize]
    }

    /// Bytes of a row of the embedding.
    fn row(&self) -> f64 {
        self.part_bytes[Part::Embed as usize] / self.config.vocab as f64
    }

    /// Bytes of a routed expert in one layer.
    fn expert(&self) -> f64 {
        let experts = self.config.routed_experts.unwrap_or(0) * self.config.moe_layers().count();
        self.part_bytes[Part::Routed as usize] / experts.max(1) as f64
    }

    /// Bytes of the routed experts that `rows` tokens are expected to choose.
    fn routed(&self, rows: usize) -> f64 {
        let experts = self.config.routed_experts.unwrap_or(0);
        let distinct = expected_experts(experts, self.config.experts_per_token, rows);
        self.config.moe_layers().count() as f64 * distinct * self.expert()
    }

    /// Operations of the absorbed attention core for one (query, key) pair, over all layers.
    fn absorbed(&self) -> f64 {
        self.core(self.config.cached_elements() + self.config.kv_lora_rank)
    }

    /// The same, keys and values expanded.
    fn expanded(&self) -> f64 {
        self.core(self.config.qk_head() + self.config.v_head)
    }

    fn core(&self, elements: usize) -> f64 {
        (2 * self.config.layers * self.config.heads * elements) as f64
    }
}

/// Experts of `experts` that are chosen at least once when each of `rows` tokens chooses `chosen` of them uniformly:
/// `E (1 − (1 − K/E)^B)`.
pub fn expected_experts(experts: usize, chosen: usize, rows: usize) -> f64 {
    if experts == 0 {
        return 0.0;
    }
    let experts_wide = experts as f64;
    experts_wide * (1.0 - (1.0 - chosen as f64 / experts_wide).powf(rows as f64))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use conclave_model::synth::{self, Preset, SynthDtype, SynthOptions};

    use super::*;

    fn costs(preset: Preset) -> Costs {
        Costs::new(&preset.config(), Dtype::Bf16, Dtype::Bf16)
    }

    fn six_layers(dtype: SynthDtype, out: PathBuf) -> SynthOptions {
        SynthOptions { preset: Preset::V2Lite, layers: Some(6), vocab: Some(32000), dtype, seed: 0, out }
    }

    /// V2-Lite's layers, six of them, with a small vocabulary.
    fn lite6() -> Costs {
        Costs::new(&six_layers(SynthDtype::Bf16, "x".into()).config().unwrap(), Dtype::Bf16, Dtype::Bf16)
    }

    fn close(found: f64, expected: f64, digits: f64) {
        assert!((found - expected).abs() <= 0.5001 * digits, "found {found}, expected {expected}");
    }

    #[test]
    fn distinct_experts_are_those_of_the_model_specification() {
        for (rows, expected) in [(1, 6.0), (8, 35.0), (32, 61.0), (64, 64.0)] {
            close(expected_experts(64, 6, rows), expected, 1.0);
        }
        for (rows, expected) in [(1, 6.0), (8, 42.0), (32, 113.0), (64, 146.0), (128, 159.0)] {
            close(expected_experts(160, 6, rows), expected, 1.0);
        }
        assert_eq!(expected_experts(0, 0, 8), 0.0);
    }

    #[test]
    fn a_token_reads_the_published_bytes() {
        close(costs(Preset::V2Lite).decode_step(1, 0.0).bytes, 4.90e9, 1e7);
        close(costs(Preset::V2).decode_step(1, 0.0).bytes, 41.70e9, 1e7);
        close(costs(Preset::V2Lite).decode_step(1, 0.0).flops, 4.90e9, 1e7);
        close(costs(Preset::V2).decode_step(1, 0.0).flops, 41.70e9, 1e7);
        let context = costs(Preset::V2).decode_step(1, 32768.0).flops - costs(Preset::V2).decode_step(1, 0.0).flops;
        close(context, 547e9, 2e9);
    }

    #[test]
    fn six_layers_of_lite_read_what_was_worked_out_for_them() {
        close(lite6().decode_step(1, 0.0).bytes, 1.124e9, 1e6);
        close(lite6().decode_step(1, 128.0).bytes, 1.125e9, 1e6);
        close(lite6().decode_step(1, 2048.0).bytes, 1.138e9, 1e6);
        close(lite6().decode_step(8, 128.0).bytes, 3.63e9, 1e7);
        close(lite6().decode_step(32, 128.0).bytes, 5.93e9, 1e7);
        close(lite6().prefill(512).flops / 512.0, 1.009e9, 1e6);
        close(lite6().prefill(2048).flops / 2048.0, 1.056e9, 1e6);
        close(lite6().prefill(2048).bytes, 6.14e9, 2e7);
        close(lite6().layer_call().bytes, 6.0 * 8_650_752.0 * 2.0, 1.0);
    }

    #[test]
    fn the_slower_of_reading_and_multiplying_decides() {
        let rates = Rates { read: 10.0, flops: 100.0 };
        assert_eq!(rates.seconds(Work { bytes: 20.0, flops: 100.0 }), 2.0);
        assert_eq!(rates.seconds(Work { bytes: 20.0, flops: 500.0 }), 5.0);
    }

    #[test]
    fn weights_in_fp8_are_read_as_they_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        let options = SynthOptions { preset: Preset::Tiny, ..six_layers(SynthDtype::Fp8, out.clone()) };
        let config = synth::write(&options, &|_, _| ()).unwrap().config;
        let checkpoint = Checkpoint::open(out.to_str().unwrap()).unwrap();
        let [cuda, cpu, wide] = ["cuda-sm90-2-x", "cpu-avx2-3", "reference-1"].map(|id| Costs::on(&checkpoint, id));
        let kept = checkpoint.loaded_bytes(Fp8Weights::Kept) as f64;
        assert_eq!(wide.total_bytes(), 2.0 * Sizes::of(&config).total() as f64);
        assert_eq!((cuda.total_bytes(), cpu.total_bytes()), (kept, kept));
        // Of an expert, each element a byte, and its scales.
        let expert =
            checkpoint.loaded_bytes_of("model.layers.1.mlp.experts.0.up_proj.weight", Fp8Weights::Kept).unwrap();
        let calls = [&cpu, &wide].map(|costs| costs.layer_call());
        assert!(calls[0].bytes > 3.0 * expert as f64 && calls[0].bytes < 0.51 * calls[1].bytes, "{calls:?}");
        assert_eq!(calls[0].flops, calls[1].flops);
    }

    #[test]
    fn a_model_without_experts_has_only_a_trunk() {
        let config =
            ModelConfig { routed_experts: None, shared_experts: None, experts_per_token: 0, ..Preset::Tiny.config() };
        let costs = Costs::new(&config, Dtype::F32, Dtype::F32);
        assert_eq!(costs.decode_step(1, 0.0).bytes, costs.decode_step(8, 0.0).bytes - 7.0 * 128.0 * 4.0);
        assert_eq!(costs.layer_call(), Work::default());
    }
}
