//! The trunk's weights: taken over from a checkpoint into a device, tensor by tensor.

use conclave_kernels::{Device, Ffn, Fp8Weights, Weight};
use conclave_model::names::{self, FfnNames, LayerNames};
use conclave_model::sizes::Part;
use conclave_model::{Checkpoint, Loading, ModelConfig, Progress};

use crate::AttentionError;

/// Everything but the routed experts.
pub struct TrunkWeights<D: Device> {
    /// `[vocab, H]`
    pub embed: D::Table,
    /// In order.
    pub layers: Vec<LayerWeights<D>>,
    /// Gain of the final norm `[H]`
    pub norm: D::Buffer,
    /// `[vocab, H]`
    pub lm_head: D::Matrix,
}

/// One decoder layer.
pub struct LayerWeights<D: Device> {
    /// Gain before attention `[H]`
    pub attention_norm: D::Buffer,
    /// Latent attention.
    pub attention: AttentionWeights<D>,
    /// Gain before the FFN `[H]`
    pub ffn_norm: D::Buffer,
    /// Dense, or gate and shared experts.
    pub ffn: LayerFfn<D::Matrix>,
}

/// Multi-head latent attention; `n` heads.
pub struct AttentionWeights<D: Device> {
    /// Query projection.
    pub query: QueryWeights<D>,
    /// `[r + dr, H]`
    pub kv_a: D::Matrix,
    /// Gain of the latent norm `[r]`
    pub kv_norm: D::Buffer,
    /// Per head `[r, dn]`: the transpose of what the checkpoint holds.
    pub uk: D::Heads,
    /// Per head `[dv, r]`
    pub uv: D::Heads,
    /// `[n · (dn + dv), r]`, where keys and values may be expanded.
    pub kv_b: Option<D::Matrix>,
    /// `[H, n · dv]`
    pub out: D::Matrix,
}

/// How queries are made.
pub enum QueryWeights<D: Device> {
    /// `[n · (dn + dr), H]`
    Direct(D::Matrix),
    /// Through a latent of `rq` elements.
    LowRank {
        /// `[rq, H]`
        a: D::Matrix,
        /// `[rq]`
        norm: D::Buffer,
        /// `[n · (dn + dr), rq]`
        b: D::Matrix,
    },
}

/// The trunk's part of a layer's FFN.
#[derive(Debug)]
pub enum LayerFfn<M> {
    /// No routed experts.
    Dense(Ffn<M>),
    /// Routed experts elsewhere.
    Moe {
        /// `[E, H]`
        gate: M,
        /// The fused shared experts, where the model has any.
        shared: Option<Ffn<M>>,
    },
}

impl<D: Device> TrunkWeights<D> {
    /// Takes the weights over; the checkpoint's mapped pages are released tensor by tensor. Unless the trunk is to be `exact`, it
    /// also gets what expands keys and values.
    ///
    /// # Errors
    /// Names the tensor that is missing, mis-shaped or refused by the device.
    pub fn load(device: &D, checkpoint: &Checkpoint, exact: bool, progress: &Progress) -> Result<Self, AttentionError> {
        let mut loader = Loader { device, exact, loading: Loading::new(checkpoint, progress, in_order(checkpoint)) };
        let config = checkpoint.config();
        Ok(Self {
            embed: loader.table(&names::embed())?,
            layers: (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?,
            norm: loader.vector(&names::final_norm())?,
            lm_head: loader.matrix(&names::lm_head())?,
        })
    }
}

/// Bytes of the trunk's tensors on a device that computes in bf16 and does this with matrices in FP8. Of what expands keys and
/// values the matrices of heads and, unless the trunk is `exact`, the whole.
pub(crate) fn trunk_bytes(checkpoint: &Checkpoint, exact: bool, fp8: Fp8Weights) -> u64 {
    let trunk = checkpoint.tensors().filter(|tensor| tensor.part != Part::Routed);
    let once = trunk.filter_map(|tensor| checkpoint.loaded_bytes_of(tensor.name, fp8));
    let expanding = (0..if exact { 0 } else { checkpoint.config().layers }).filter_map(|layer| {
        let name = names::layer(layer).kv_b_proj();
        match fp8 {
            Fp8Weights::Kept | Fp8Weights::Multiplied => checkpoint.bytes_of(&name),
            Fp8Weights::Widened => checkpoint.loaded_bytes_of(&name, fp8),
        }
    });
    once.chain(expanding).sum()
}

/// The trunk's tensors as they are used: layer by layer, within a layer as they lie in the files.
fn in_order(checkpoint: &Checkpoint) -> Vec<String> {
    let mut order = vec![names::embed()];
    for layer in 0..checkpoint.config().layers {
        let names = names::layer(layer);
        let of_layer = checkpoint.tensors().filter(|tensor| tensor.name.starts_with(names.prefix()));
        let mut tensors: Vec<_> = of_layer.filter(|tensor| tensor.part != Part::Routed && !tensor.is_scales).collect();
        tensors.sort_by_key(|tensor| tensor.place);
        order.extend(tensors.into_iter().map(|tensor| tensor.name.to_owned()));
    }
    order.extend([names::final_norm(), names::lm_head()]);
    order
}

struct Loader<'a, D> {
    device: &'a D,
    exact: bool,
    loading: Loading<'a>,
}

impl<D: Device> Loader<'_, D> {
    fn layer(&mut self, layer: usize) -> Result<LayerWeights<D>, AttentionError> {
        let names = names::layer(layer);
        Ok(LayerWeights {
            attention_norm: self.vector(&names.input_norm())?,
            attention: self.attention(&names)?,
            ffn_norm: self.vector(&names.post_attention_norm())?,
            ffn: self.layer_ffn(layer, &names)?,
        })
    }

    fn attention(&mut self, names: &LayerNames) -> Result<AttentionWeights<D>, AttentionError> {
        let query = match self.config().q_lora_rank {
            None => QueryWeights::Direct(self.matrix(&names.q_proj())?),
            Some(_) => QueryWeights::LowRank {
                a: self.matrix(&names.q_a_proj())?,
                norm: self.vector(&names.q_a_norm())?,
                b: self.matrix(&names.q_b_proj())?,
            },
        };
        let kv_a = self.matrix(&names.kv_a_proj())?;
        let kv_norm = self.vector(&names.kv_a_norm())?;
        let kv_b = self.kv_b(&names.kv_b_proj())?;
        let (uk, uv) = self.split_heads(&names.kv_b_proj())?;
        Ok(AttentionWeights { query, kv_a, kv_norm, uk, uv, kv_b, out: self.matrix(&names.o_proj())? })
    }

    /// The matrix that expands keys and values, unless the trunk is exact.
    fn kv_b(&mut self, name: &str) -> Result<Option<D::Matrix>, AttentionError> {
        if self.exact {
            return Ok(None);
        }
        let weight = self.loading.weight(name)?;
        self.device.load_matrix(weight).map(Some).map_err(AttentionError::device(name))
    }

    /// `[n · (dn + dv), r]` → per head the key part, transposed, and the value part (MODEL §2, row layouts).
    fn split_heads(&mut self, name: &str) -> Result<(D::Heads, D::Heads), AttentionError> {
        let (heads, nope, value) = (self.config().heads, self.config().qk_nope, self.config().v_head);
        let whole = self.loading.weight(name)?;
        let (mut uk, mut uv) = (Vec::with_capacity(heads), Vec::with_capacity(heads));
        for head in 0..heads {
            let first = head * (nope + value);
            uk.push(whole.slice(first, nope).transpose());
            uv.push(whole.slice(first + nope, value));
        }
        let load = |heads: &[Weight<'_>]| self.device.load_heads(heads).map_err(AttentionError::device(name));
        let loaded = (load(&uk)?, load(&uv)?);
        self.loading.taken_over(name);
        Ok(loaded)
    }

    fn layer_ffn(&mut self, layer: usize, names: &LayerNames) -> Result<LayerFfn<D::Matrix>, AttentionError> {
        if !self.config().is_moe(layer) {
            return Ok(LayerFfn::Dense(self.ffn(&names.dense())?));
        }
        let gate = self.matrix(&names.gate())?;
        let shared = self.config().shared_experts.is_some().then(|| self.ffn(&names.shared())).transpose()?;
        Ok(LayerFfn::Moe { gate, shared })
    }

    fn ffn(&mut self, names: &FfnNames) -> Result<Ffn<D::Matrix>, AttentionError> {
        Ok(Ffn {
            gate: self.matrix(&names.gate_proj())?,
            up: self.matrix(&names.up_proj())?,
            down: self.matrix(&names.down_proj())?,
        })
    }

    fn matrix(&mut self, name: &str) -> Result<D::Matrix, AttentionError> {
        let weight = self.loading.weight(name)?;
        let matrix = self.device.load_matrix(weight).map_err(AttentionError::device(name))?;
        self.loading.taken_over(name);
        Ok(matrix)
    }

    fn table(&mut self, name: &str) -> Result<D::Table, AttentionError> {
        let weight = self.loading.weight(name)?;
        let table = self.device.load_table(weight).map_err(AttentionError::device(name))?;
        self.loading.taken_over(name);
        Ok(table)
    }

    fn vector(&mut self, name: &str) -> Result<D::Buffer, AttentionError> {
        self.device.load_vector(self.loading.vector(name)?).map_err(AttentionError::device(name))
    }

    fn config(&self) -> &ModelConfig {
        self.loading.checkpoint().config()
    }
}

#[cfg(test)]
mod tests {
    use conclave_model::synth::{self, Preset, SynthDtype, SynthOptions};

    use super::*;

    #[test]
    fn the_trunk_is_what_the_cells_leave_and_what_expands_is_counted_twice() {
        for dtype in [SynthDtype::Bf16, SynthDtype::Fp8] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("m");
            let (preset, location) = (Preset::Tiny, out.display().to_string());
            let options = SynthOptions { preset, layers: Some(2), vocab: None, dtype, seed: 0, out };
            synth::write(&options, &|_, _| ()).unwrap();
            let checkpoint = Checkpoint::open(&location).unwrap();
            let cells = checkpoint.config().cell_groups() as u64;
            for fp8 in [Fp8Weights::Kept, Fp8Weights::Widened] {
                let exact = trunk_bytes(&checkpoint, true, fp8);
                assert_eq!(
                    exact + cells * checkpoint.cell_bytes(fp8),
                    checkpoint.loaded_bytes(fp8),
                    "{dtype:?} {fp8:?}"
                );
                let names = [0, 1].map(|layer| names::layer(layer).kv_b_proj());
                let stored: u64 = names.iter().filter_map(|name| checkpoint.bytes_of(name)).sum();
                let wide: usize =
                    names.iter().map(|name| checkpoint.weight(name).unwrap()).map(|w| w.rows * w.cols * 2).sum();
                let whole = if fp8 == Fp8Weights::Kept { stored } else { wide as u64 };
                assert_eq!(trunk_bytes(&checkpoint, false, fp8), exact + whole, "{dtype:?} {fp8:?}");
            }
        }
    }
}
