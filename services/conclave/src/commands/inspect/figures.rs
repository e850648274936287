//! What an architecture comes to in parameters, bytes and memory. Pure.

use conclave_kernels::{Cpu, Device, Dtype, Fp8Weights};
use conclave_model::{
    AvailableMemory, ModelConfig, StoredSizes,
    sizes::{Part, Sizes},
};
use serde::Serialize;

const GIB: u64 = 1 << 30;

/// What the bytes of parts and figures are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// As the files have them, and so does the device.
    Stored,
    /// As bf16 would, since not all of the files are there or the device widens them.
    Bf16,
}

/// One part of the model.
#[derive(Debug, Serialize)]
pub struct PartSize {
    pub part: &'static str,
    pub parameters: u64,
    pub bytes: u64,
    /// Of all bytes.
    pub share: f64,
}

/// What follows from the architecture.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub basis: Basis,
    pub parameters: u64,
    pub bytes: u64,
    pub activated_parameters: u64,
    /// All but the routed experts: what an attention service holds.
    pub trunk_bytes: u64,
    pub expert_parameters: u64,
    pub expert_bytes: u64,
    pub cells: usize,
    /// Experts of a cell in each MoE layer.
    pub cell_experts: usize,
    pub cell_parameters: u64,
    pub cell_bytes: u64,
    /// Weights read to decode one token at batch 1.
    pub decoded_bytes: u64,
    /// Of the bf16 latent cache, over all layers.
    pub latent_bytes_per_token: u64,
    pub latent_tokens_per_gib: u64,
}

/// Whether this machine could hold the weights.
#[derive(Debug, Serialize)]
pub struct Memory {
    pub needed: u64,
    pub available: u64,
    pub limited_by: String,
    pub fits: bool,
    /// At most all of them.
    pub cells_that_fit: usize,
}

/// The parts of an architecture; those it does not have are left out.
pub fn parts(config: &ModelConfig, stored: &StoredSizes, fp8: Fp8Weights) -> Vec<PartSize> {
    let sizes = Sizes::of(config);
    let basis = Basis::of(config, &sizes, stored, fp8);
    let bytes = |part| match basis {
        Basis::Stored if part == Part::Attention => stored.part_bytes(part) + stored.widened_heads(),
        Basis::Stored => stored.part_bytes(part),
        Basis::Bf16 => sizes.part_bytes(part, Dtype::Bf16),
    };
    part_sizes(|part| sizes.part(part), bytes)
}

/// The parts of the tensors that are there, for want of a configuration.
pub fn stored_parts(stored: &StoredSizes) -> Vec<PartSize> {
    part_sizes(|part| stored.part(part), |part| stored.part_bytes(part))
}

fn part_sizes(parameters: impl Fn(Part) -> u64, bytes: impl Fn(Part) -> u64) -> Vec<PartSize> {
    let total: u64 = Part::ALL.into_iter().map(&bytes).sum();
    let size = |part: Part| PartSize {
        part: part.name(),
        parameters: parameters(part),
        bytes: bytes(part),
        share: bytes(part) as f64 / total.max(1) as f64,
    };
    Part::ALL.into_iter().map(size).filter(|size| size.parameters > 0).collect()
}

impl Basis {
    fn of(config: &ModelConfig, sizes: &Sizes, stored: &StoredSizes, fp8: Fp8Weights) -> Self {
        let as_they_are = config.quantization.is_none() || fp8 != Fp8Weights::Widened;
        if as_they_are && stored.covers(sizes) { Self::Stored } else { Self::Bf16 }
    }
}

impl Figures {
    /// Counts in stored bytes where all tensors are there and are used as they are (but for those that every device widens), else
    /// in bf16.
    pub fn new(config: &ModelConfig, stored: &StoredSizes, fp8: Fp8Weights) -> Self {
        let sizes = Sizes::of(config);
        let basis = Basis::of(config, &sizes, stored, fp8);
        let wide = |parameters: u64| parameters * Dtype::Bf16.size() as u64;
        let (bytes, routed, expert, cell, decoded) = match basis {
            Basis::Bf16 => {
                let routed = wide(sizes.part(Part::Routed));
                (wide(sizes.total()), routed, wide(sizes.expert), wide(sizes.cell), wide(sizes.decoded))
            }
            Basis::Stored => {
                let (routed, cell) = (stored.part_bytes(Part::Routed), stored.cell_bytes(config));
                let [total, decoded] =
                    [stored.total_bytes(), stored.decoded_bytes(config)].map(|bytes| bytes + stored.widened_heads());
                (total, routed, stored.expert_bytes(config), cell, decoded)
            }
        };
        let latent = sizes.latent_bytes(Dtype::Bf16);
        let block = <Cpu as Device>::BLOCK as u64;
        Self {
            basis,
            parameters: sizes.total(),
            bytes,
            activated_parameters: sizes.activated,
            trunk_bytes: bytes - routed,
            expert_parameters: sizes.expert,
            expert_bytes: expert,
            cells: sizes.cells,
            cell_experts: config.routed_experts.unwrap_or(0).checked_div(sizes.cells).unwrap_or(0),
            cell_parameters: sizes.cell,
            cell_bytes: cell,
            decoded_bytes: decoded,
            latent_bytes_per_token: latent,
            latent_tokens_per_gib: GIB / (latent * block) * block,
        }
    }
}

impl Memory {
    /// Compares what is needed with what there is.
    pub fn new(figures: &Figures, memory: AvailableMemory) -> Self {
        let cells = usize::try_from(memory.bytes / figures.cell_bytes.max(1)).unwrap_or(usize::MAX);
        Self {
            needed: figures.bytes,
            available: memory.bytes,
            fits: figures.bytes <= memory.bytes,
            limited_by: memory.limited_by,
            cells_that_fit: cells.min(figures.cells),
        }
    }
}

#[cfg(test)]
mod tests {
    use conclave_model::{
        Checkpoint, Survey,
        synth::{self, Preset, SynthDtype, SynthOptions},
    };

    use super::*;

    fn memory(bytes: u64) -> AvailableMemory {
        AvailableMemory { bytes, limited_by: "MemAvailable".into() }
    }

    #[test]
    fn v2_lite_has_the_published_figures() {
        let (config, nothing) = (Preset::V2Lite.config(), StoredSizes::default());
        let figures = Figures::new(&config, &nothing, Fp8Weights::Widened);
        assert_eq!((figures.basis, figures.parameters, figures.bytes), (Basis::Bf16, 15_706_484_224, 31_412_968_448));
        assert_eq!((figures.expert_bytes, figures.cells, figures.cell_experts), (17_301_504, 8, 8));
        assert_eq!((figures.activated_parameters, figures.decoded_bytes), (2_661_150_208, 4_902_874_112));
        assert_eq!((figures.latent_bytes_per_token, figures.latent_tokens_per_gib), (31_104, 34_496));
        assert_eq!(figures.trunk_bytes + 8 * figures.cell_bytes, figures.bytes);
        let memory = Memory::new(&figures, memory(10_000_000_000));
        assert_eq!((memory.fits, memory.cells_that_fit), (false, 2));
        assert!(
            (parts(&config, &nothing, Fp8Weights::Widened).iter().map(|part| part.share).sum::<f64>() - 1.0).abs()
                < 1e-9
        );
    }

    #[test]
    fn weights_in_fp8_count_as_the_device_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        let (preset, dtype, location) = (Preset::Tiny, SynthDtype::Fp8, out.display().to_string());
        let options = SynthOptions { preset, layers: None, vocab: None, dtype, seed: 0, out };
        let config = synth::write(&options, &|_, _| ()).unwrap().config;
        let (checkpoint, survey) = (Checkpoint::open(&location).unwrap(), Survey::of(&location).unwrap());
        let [kept, widened] =
            [Fp8Weights::Kept, Fp8Weights::Widened].map(|fp8| (fp8, Figures::new(&config, &survey.stored, fp8)));
        for (fp8, figures) in [&kept, &widened] {
            assert_eq!(figures.bytes, checkpoint.loaded_bytes(*fp8), "{fp8:?}");
            assert_eq!(figures.cell_bytes, checkpoint.cell_bytes(*fp8), "{fp8:?}");
            assert_eq!(figures.trunk_bytes + 8 * figures.cell_bytes, figures.bytes, "{fp8:?}");
            let of_parts: u64 = parts(&config, &survey.stored, *fp8).iter().map(|part| part.bytes).sum();
            assert_eq!(of_parts, figures.bytes, "{fp8:?}");
        }
        assert_eq!((kept.1.basis, widened.1.basis), (Basis::Stored, Basis::Bf16));
        assert_eq!(widened.1.bytes, 2 * widened.1.parameters);
        assert!(kept.1.decoded_bytes * 3 < widened.1.decoded_bytes * 2, "{} bytes", kept.1.decoded_bytes);
    }

    #[test]
    fn a_model_without_experts_has_no_cells() {
        let dense = ModelConfig { routed_experts: None, experts_per_token: 0, ..Preset::Tiny.config() };
        let nothing = StoredSizes::default();
        let figures = Figures::new(&dense, &nothing, Fp8Weights::Widened);
        let memory = Memory::new(&figures, memory(u64::MAX));
        assert_eq!((figures.cells, figures.cell_bytes, figures.trunk_bytes), (0, 0, figures.bytes));
        assert_eq!((memory.fits, memory.cells_that_fit), (true, 0));
        assert!(!parts(&dense, &nothing, Fp8Weights::Widened).iter().any(|part| part.part == "routed experts"));
    }
}
