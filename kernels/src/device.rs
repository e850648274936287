//! The device trait: the operations of the model, as one piece of hardware runs them.
//!
//! Buffers between operations are f32. A device whose activation type is bf16 rounds where an operation says so.
//! Every output element is accumulated in an order fixed by its own coordinates: never by the number of rows.

use crate::{Dtype, KernelError, RotaryTable, Weight};

/// A SwiGLU block: `down( silu(gate·x) ⊙ (up·x) )`.
#[derive(Debug)]
pub struct Ffn<M> {
    /// `[I, H]`
    pub gate: M,
    /// `[I, H]`
    pub up: M,
    /// `[H, I]`
    pub down: M,
}

/// Sizes of multi-head latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaShape {
    /// Query heads `n`.
    pub heads: usize,
    /// Query and key elements a head without position `dn`.
    pub nope: usize,
    /// Query and key elements a head with rotary position `dr`.
    pub rope: usize,
    /// Value elements a head `dv`.
    pub value: usize,
    /// Latent elements a token `r`.
    pub latent: usize,
}

impl MlaShape {
    /// Elements cached a token and layer: the normed latent, then the roped key.
    pub fn cached(&self) -> usize {
        self.latent + self.rope
    }
}

/// The rows of one sequence within a step: consecutive positions of it.
#[derive(Debug, Clone, Copy)]
pub struct SequenceRows<'a> {
    /// First row of the step's batch.
    pub first_row: usize,
    /// Rows.
    pub rows: usize,
    /// Absolute position of the first row; the sequence's earlier positions are in the cache.
    pub first_position: usize,
    /// Cache blocks of the sequence, in order of position.
    pub blocks: &'a [u32],
}

/// The rows of one routed expert within a merged batch.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a, M> {
    /// The expert's weights.
    pub ffn: &'a Ffn<M>,
    /// Rows of `x`.
    pub rows: &'a [u32],
    /// Routing weight of each row.
    pub weights: &'a [f32],
    /// Row of `out` that each weighted output is added to; distinct within one expert.
    pub slots: &'a [u32],
}

/// The operations of the model on one device.
///
/// Slices have exactly the sizes in their comments (`T` rows); anything else is a bug of the caller and panics.
pub trait Device: Send + Sync + 'static {
    /// A weight matrix `[out, in]` in the device's layout.
    type Matrix: Send + Sync + 'static;
    /// An embedding table `[vocab, H]`.
    type Table: Send + Sync + 'static;
    /// The paged latent cache of all layers.
    type Cache: Send + 'static;

    /// Positions of one cache block.
    const BLOCK: usize = 64;
    /// Positions of one fixed attention split, aligned to absolute position.
    const SPLIT: usize = 512;

    /// Element type of matrix inputs, of the latent cache and of the wire.
    fn activation(&self) -> Dtype;
    /// Names everything that decides bits: kernel version, instruction set, formats.
    fn numerics(&self) -> String;

    /// Takes a matrix over into the device's own memory.
    ///
    /// # Errors
    /// When the bytes do not match the shape or memory cannot be had.
    fn load_matrix(&self, weight: Weight<'_>) -> Result<Self::Matrix, KernelError>;
    /// Takes an embedding table over.
    ///
    /// # Errors
    /// As for [`Device::load_matrix`].
    fn load_table(&self, weight: Weight<'_>) -> Result<Self::Table, KernelError>;
    /// Bytes that a matrix takes in the device's memory.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;
    /// Outputs of a matrix, and inputs.
    fn matrix_shape(&self, matrix: &Self::Matrix) -> (usize, usize);
    /// A zeroed cache of `layers` x `blocks` blocks; memory is taken when first written.
    ///
    /// # Errors
    /// When the address space cannot be had.
    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError>;

    /// `out [T, H] = table[tokens]`
    fn embed(&self, table: &Self::Table, tokens: &[u32], out: &mut [f32]);
    /// `out [T, H] = gain ⊙ x / sqrt(mean(x²) + eps)`, one row at a time; `H = gain.len()`.
    fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]);
    /// `y [T, out] = round(x [T, in]) · Wᵀ`
    fn linear(&self, x: &[f32], w: &Self::Matrix, y: &mut [f32]);
    /// `y [T, E] = x [T, H] · Wᵀ`, the input not rounded.
    fn gate_logits(&self, x: &[f32], w: &Self::Matrix, y: &mut [f32]);
    /// `y [T, H] = down · round( silu(gate · round(x)) ⊙ (up · round(x)) )`
    fn ffn(&self, x: &[f32], ffn: &Ffn<Self::Matrix>, y: &mut [f32]);
    /// For each expert in turn and each of its rows: `out[slot] += weight · ffn(x[row])`. `x [R, H]`, `out [S, H]`.
    fn grouped_ffn(&self, x: &[f32], experts: &[ExpertRows<'_, Self::Matrix>], out: &mut [f32]);

    /// Absorbed queries. `q [T, n, dn + dr]` → `out [T, n, r + dr]`: `UKᵀ · round(q_nope)`, then the roped `q_pe`.
    /// `uk`: `n` matrices `[r, dn]`.
    fn mla_queries(
        &self,
        shape: &MlaShape,
        q: &[f32],
        uk: &[Self::Matrix],
        rotary: &RotaryTable,
        positions: &[u32],
        out: &mut [f32],
    );
    /// Norms the latent part (eps 1e-6), ropes the key part and writes both into the cache, rounded.
    /// `kv [T, r + dr]`; `slots[t] = block · BLOCK + offset`.
    fn write_latents(&self, cache: &mut Self::Cache, layer: usize, write: &LatentWrite<'_>);
    /// Absorbed causal attention over the cache. `q [T, n, r + dr]` → `out [T, n, r]`. Keys are reduced in splits of
    /// `SPLIT` positions, merged in ascending order. Cache slots past a row's own position are never read into a result.
    fn mla_attention(
        &self,
        cache: &Self::Cache,
        layer: usize,
        q: &[f32],
        sequences: &[SequenceRows<'_>],
        scale: f32,
        out: &mut [f32],
    );
    /// `out [T, n · dv]`: per head `UV · round(o_lat)`. `o_lat [T, n, r]`; `uv`: `n` matrices `[dv, r]`.
    fn mla_values(&self, shape: &MlaShape, o_lat: &[f32], uv: &[Self::Matrix], out: &mut [f32]);
}

/// The rows that [`Device::write_latents`] takes.
#[derive(Debug, Clone, Copy)]
pub struct LatentWrite<'a> {
    /// `[T, r + dr]`: the latent before its norm, then the key before its rotation.
    pub kv: &'a [f32],
    /// Gain of the latent norm `[r]`.
    pub gain: &'a [f32],
    /// Cosines and sines.
    pub rotary: &'a RotaryTable,
    /// Absolute position of each row.
    pub positions: &'a [u32],
    /// `block · BLOCK + offset` of each row.
    pub slots: &'a [u32],
}
