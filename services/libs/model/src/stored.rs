//! How large a checkpoint's tensors are as they lie in its files.

use std::collections::BTreeMap;

use conclave_kernels::Dtype;

use crate::sizes::{Part, Sizes};
use crate::tensors::{FP8, Shard, ignored};
use crate::{ModelConfig, names};

/// Elements and bytes of a checkpoint's tensors, part by part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredSizes {
    elements: [u64; Part::ALL.len()],
    bytes: [u64; Part::ALL.len()],
    /// Bytes of the matrices that devices get as one a head as far as they are in FP8, and of their scales.
    heads: [u64; 2],
    /// Tensors, those of no part included.
    pub tensors: usize,
    /// Bytes of tensors that serving does not read: rotary frequencies, layers for speculation, unknown ones.
    pub other_bytes: u64,
    /// Bytes by element type, as the format spells it.
    pub dtypes: BTreeMap<&'static str, u64>,
}

impl StoredSizes {
    /// Adds up the tensors of some files. Without a configuration the names alone tell the parts.
    pub(crate) fn of(config: Option<&ModelConfig>, shards: &[Shard]) -> Self {
        let mut sizes = Self::default();
        for entry in shards.iter().flat_map(|shard| &shard.entries) {
            let bytes = entry.end - entry.begin;
            let unused = config.is_some_and(|config| ignored(config, &entry.name));
            match Part::of(&entry.name).filter(|_| !unused) {
                None => sizes.other_bytes += bytes,
                Some(part) => {
                    sizes.elements[part as usize] += entry.shape.iter().product::<u64>();
                    sizes.bytes[part as usize] += bytes;
                    sizes.count_heads(&entry.name, entry.dtype, bytes);
                }
            }
            sizes.tensors += 1;
            *sizes.dtypes.entry(entry.dtype).or_default() += bytes;
        }
        sizes
    }

    fn count_heads(&mut self, name: &str, dtype: &str, bytes: u64) {
        let scales = name.ends_with(names::SCALES);
        if names::is_of_heads(name) && (scales || dtype == FP8) {
            self.heads[usize::from(scales)] += bytes;
        }
    }

    /// Bytes that are added by widening what devices get as one matrix a head, which those do that keep FP8, too.
    pub fn widened_heads(&self) -> u64 {
        let [values, scales] = self.heads;
        (values * (Dtype::Bf16.size() as u64 - 1)).saturating_sub(scales)
    }

    /// Elements of one part, scales of quantised weights included.
    pub fn part(&self, part: Part) -> u64 {
        self.elements[part as usize]
    }

    /// Bytes of one part.
    pub fn part_bytes(&self, part: Part) -> u64 {
        self.bytes[part as usize]
    }

    /// Bytes of all parts.
    pub fn total_bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// Whether no part has fewer elements than the architecture gives it.
    pub fn covers(&self, sizes: &Sizes) -> bool {
        Part::ALL.into_iter().all(|part| self.part(part) >= sizes.part(part))
    }

    /// Bytes of one cell. 0 where every layer is dense.
    pub fn cell_bytes(&self, config: &ModelConfig) -> u64 {
        self.part_bytes(Part::Routed).checked_div(config.cell_groups() as u64).unwrap_or(0)
    }

    /// Bytes of one routed expert in one layer. 0 where every layer is dense.
    pub fn expert_bytes(&self, config: &ModelConfig) -> u64 {
        let experts = config.routed_experts.unwrap_or(0) * config.moe_layers().count();
        self.part_bytes(Part::Routed).checked_div(experts as u64).unwrap_or(0)
    }

    /// Bytes that decoding one token alone reads: of the embedding one row, of the routed experts the chosen ones.
    pub fn decoded_bytes(&self, config: &ModelConfig) -> u64 {
        let chosen = (config.experts_per_token * config.moe_layers().count()) as u64 * self.expert_bytes(config);
        let row = self.part_bytes(Part::Embed) / config.vocab as u64;
        let whole = Part::ALL.into_iter().filter(|part| !matches!(part, Part::Embed | Part::Routed));
        whole.map(|part| self.part_bytes(part)).sum::<u64>() + row + chosen
    }
}
