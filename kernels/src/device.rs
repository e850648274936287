//! The device trait: the operations of the model, as one piece of hardware runs them.
//!
//! Buffers between operations are f32 and lie in the device's memory. A device whose activation type is bf16 rounds where
//! an operation says so. Every output element is accumulated in an order fixed by its own coordinates: never by the number
//! of rows.

use crate::{
    Dtype, FoundToken, GroupedSums, KernelError, Pool, Published, RotaryTable, StepRows, TokenAsk, Wanted, Weight,
    link::{Link, LinkEnd, Until},
};

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

/// What becomes of a matrix in FP8 when a device takes it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8Weights {
    /// It is widened and then kept as any other: two bytes an element where that is bf16.
    Widened,
    /// It stays as it is, with its scales: a byte an element. (Tables and the matrices of heads are widened all the same.)
    Kept,
    /// The same, and products are in FP8: what is multiplied by it is rounded to FP8, too.
    Multiplied,
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

/// Multi-head latent attention as all layers share it.
#[derive(Debug)]
pub struct Mla<R> {
    /// Sizes.
    pub shape: MlaShape,
    /// Cosines and sines, on the device.
    pub rotary: R,
    /// What scores are multiplied by.
    pub scale: f32,
}

/// What a step leaves in one layer of the latent cache.
#[derive(Debug, Clone, Copy)]
pub struct LatentWrite<'a, B> {
    /// Which layer.
    pub layer: usize,
    /// `[T, r + dr]`: the latent before its norm, then the key before its rotation.
    pub kv: &'a B,
    /// Gain of the latent norm `[r]`.
    pub gain: &'a B,
}

/// The rows of one routed expert within a merged batch.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a, M> {
    /// The expert's weights.
    pub ffn: &'a Ffn<M>,
    /// Rows of the inputs.
    pub rows: &'a [u32],
    /// Routing weight of each row.
    pub weights: &'a [f32],
    /// Sum that each weighted output is added to; distinct within one expert.
    pub slots: &'a [u32],
}

/// The operations of the model on one device.
///
/// A device may have memory of its own and work that is queued. What is loaded stays there; operations take and leave
/// buffers there, and make their output as long as it has to be. Values come back to the host by [`Device::read`],
/// [`Device::take`], [`Device::grouped_ffn`] and [`Device::find_tokens`] alone: these wait for what was queued before them,
/// and say so if any of it failed. A device that has failed once has failed for good; its operations then do nothing.
///
/// Inputs have the sizes in their comments (`T` rows); anything else is a bug of the caller and panics.
pub trait Device: Send + Sync + 'static {
    /// A weight matrix `[out, in]` in the device's layout.
    type Matrix: Send + Sync + 'static;
    /// A weight matrix `[out, in]` for each of `n` heads.
    type Heads: Send + Sync + 'static;
    /// An embedding table `[vocab, H]`.
    type Table: Send + Sync + 'static;
    /// Cosines and sines of all positions.
    type Rotary: Send + Sync + 'static;
    /// The paged latent cache of all layers.
    type Cache: Send + 'static;
    /// f32 values in the device's memory. The default has none.
    type Buffer: Default + Send + Sync + 'static;
    /// The rows of a step: what operations look up by row. The default has none.
    type Batch: Default + Send + 'static;
    /// What a dispatch point needs, on its way to the host.
    type Fetched: Send + 'static;

    /// Memory that two processes see; [`NotShared`](crate::NotShared) where a device has none.
    type Shared: Send + Sync + 'static;

    /// Whether operations are queued, and done while the host goes on.
    const QUEUES: bool = false;

    /// Positions of one cache block.
    const BLOCK: usize = 64;
    /// Positions of one fixed attention split, aligned to absolute position.
    const SPLIT: usize = 512;

    /// Element type of matrix inputs, of the latent cache and of the wire.
    fn activation(&self) -> Dtype;
    /// Names everything that decides bits: kernel version, instruction set, formats.
    fn numerics(&self) -> String;

    /// What becomes of matrices in FP8.
    fn fp8_weights(&self) -> Fp8Weights {
        Fp8Weights::Widened
    }

    /// Takes a matrix over into the device's own memory. One in FP8 comes as it lies in the checkpoint: how it is kept, and what
    /// its products round, is the device's own.
    ///
    /// # Errors
    /// When the bytes do not match the shape or memory cannot be had.
    fn load_matrix(&self, weight: Weight<'_>) -> Result<Self::Matrix, KernelError>;
    /// Takes one matrix a head over, all of one shape.
    ///
    /// # Errors
    /// As for [`Device::load_matrix`].
    fn load_heads(&self, heads: &[Weight<'_>]) -> Result<Self::Heads, KernelError>;
    /// Takes an embedding table over.
    ///
    /// # Errors
    /// As for [`Device::load_matrix`].
    fn load_table(&self, weight: Weight<'_>) -> Result<Self::Table, KernelError>;
    /// Takes a vector over, such as the gain of a norm.
    ///
    /// # Errors
    /// When memory cannot be had.
    fn load_vector(&self, values: Vec<f32>) -> Result<Self::Buffer, KernelError>;
    /// Takes the table of the rotary embedding over.
    ///
    /// # Errors
    /// When memory cannot be had.
    fn load_rotary(&self, table: RotaryTable) -> Result<Self::Rotary, KernelError>;
    /// A zeroed cache `[layers, blocks, BLOCK, r + dr]` in elements of the activation type: `blocks` blocks of
    /// [`Device::BLOCK`] positions for each of `layers` layers, and a row of [`MlaShape::cached`] elements a position (which a
    /// device may pad). A block has the same number in every layer; slot `block · BLOCK + offset` is one position of a layer,
    /// to which [`StepRows`] point. The host's memory is taken page by page when first written, a GPU's at once.
    ///
    /// # Errors
    /// When the host has not as much address space ([`KernelError::Os`]) or the GPU not as much memory
    /// ([`KernelError::Cuda`]).
    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError>;
    /// Bytes that a matrix takes in the device's memory.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;
    /// Outputs of a matrix, and inputs.
    fn matrix_shape(&self, matrix: &Self::Matrix) -> (usize, usize);
    /// Values in a buffer.
    fn length(&self, buffer: &Self::Buffer) -> usize;

    /// Takes the rows of a step over, in place of those that `batch` holds.
    fn load_batch(&self, rows: StepRows, batch: &mut Self::Batch);
    /// Gives `values` all that is in `x`, which is spent.
    ///
    /// # Errors
    /// When the device has failed.
    fn read(&self, x: &mut Self::Buffer, values: &mut Vec<f32>) -> Result<(), KernelError>;
    /// Has `x`, rounded to the activation type, and all that is in `y`, which is spent, brought to the host as they are now.
    fn fetch(&self, x: &Self::Buffer, y: &mut Self::Buffer) -> Self::Fetched;
    /// Waits for what was fetched, and for nothing that was queued after it: `x` as little-endian bytes, and the values of `y`.
    ///
    /// # Errors
    /// When the device has failed.
    fn take(&self, fetched: Self::Fetched) -> Result<(Vec<u8>, Vec<f32>), KernelError>;
    /// Starts what has been queued where a device gathers it first. `piece` names what was queued since the last call, of which
    /// about the same should come under the same name in each step.
    fn submit(&self, piece: u32) {
        let _ = piece;
    }
    /// `out = x`, which is of the activation type, little-endian.
    fn decode(&self, x: &[u8], out: &mut Self::Buffer);
    /// `out [R, width]`: some rows of each `x [T, width]`, one behind the other.
    fn gather(&self, parts: &[(&Self::Buffer, &[u32])], width: usize, out: &mut Self::Buffer);
    /// `x += delta`
    fn add(&self, x: &mut Self::Buffer, delta: &Self::Buffer);
    /// `x += a + b`
    fn add_two(&self, x: &mut Self::Buffer, a: &Self::Buffer, b: &Self::Buffer);

    /// `out [T, H] = table[tokens]`
    fn embed(&self, table: &Self::Table, batch: &Self::Batch, out: &mut Self::Buffer);
    /// `out [T, H] = gain ⊙ x / sqrt(mean(x²) + eps)`, one row at a time; `gain [H]`.
    fn rms_norm(&self, x: &Self::Buffer, gain: &Self::Buffer, eps: f32, out: &mut Self::Buffer);
    /// `y [T, out] = round(x [T, in]) · Wᵀ`
    fn linear(&self, x: &Self::Buffer, w: &Self::Matrix, y: &mut Self::Buffer);
    /// `y [T, E] = x [T, H] · Wᵀ`, the input not rounded.
    fn gate_logits(&self, x: &Self::Buffer, w: &Self::Matrix, y: &mut Self::Buffer);
    /// `y [T, H] = down · round( silu(gate · round(x)) ⊙ (up · round(x)) )`
    fn ffn(&self, x: &Self::Buffer, ffn: &Ffn<Self::Matrix>, y: &mut Self::Buffer);
    /// For each expert in turn and each of its rows: `sums[slot] += weight · ffn(x[row])`, from zero; in the end `sums [S, H]`
    /// are rounded. The rows `x [R, H]` are of the activation type, little-endian, in one or more parts.
    ///
    /// # Errors
    /// When the device has failed.
    fn grouped_ffn(
        &self,
        x: &[&[u8]],
        experts: &[ExpertRows<'_, Self::Matrix>],
        sums: &mut [f32],
    ) -> Result<(), KernelError>;

    /// Lets the bits of [`Device::linear`] and [`Device::ffn`] depend on the number of rows from now on, where that is faster.
    fn relax(&self) {}
    /// The host's threads that it computes on, which others may use between two operations.
    fn pool(&self) -> Option<&Pool> {
        None
    }
    /// Whether there is [`Device::mla_expanded`]; without it no span is to be expanded.
    fn expands(&self) -> bool {
        false
    }
    /// Absorbed queries. Rows of spans that are expanded are left out here and in the two operations below; what their outputs
    /// hold is undefined. `q [T, n, dn + dr]` → `out [T, n, r + dr]`: `UKᵀ · round(q_nope)`, then the roped `q_pe`.
    /// `uk`: `n` matrices `[r, dn]`.
    fn mla_queries(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        q: &Self::Buffer,
        uk: &Self::Heads,
        out: &mut Self::Buffer,
    );
    /// Norms the latent part (eps 1e-6), ropes the key part and writes both into the cache, rounded.
    fn write_latents(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        write: &LatentWrite<'_, Self::Buffer>,
        cache: &mut Self::Cache,
    );
    /// Absorbed causal attention over a layer of the cache. `q [T, n, r + dr]` → `out [T, n, r]`. Keys are reduced in splits
    /// of `SPLIT` positions, merged in ascending order. Cache slots past a row's own position are never read into a result.
    fn mla_attention(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        cache: (&Self::Cache, usize),
        q: &Self::Buffer,
        out: &mut Self::Buffer,
    );
    /// `out [T, n · dv]`: per head `UV · round(o_lat)`. `o_lat [T, n, r]`; `uv`: `n` matrices `[dv, r]`.
    fn mla_values(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        o_lat: &Self::Buffer,
        uv: &Self::Heads,
        out: &mut Self::Buffer,
    );
    /// Causal attention of the expanded spans: keys `UK · c` and values `UV · c` of all latents of a sequence so far, rounded.
    /// `q [T, n, dn + dr]` as projected → rows of these spans of `out [T, n · dv]`. `kv_b [n · (dn + dv), r]`.
    fn mla_expanded(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        cache: (&Self::Cache, usize),
        q: &Self::Buffer,
        kv_b: &Self::Matrix,
        out: &mut Self::Buffer,
    ) {
        let _ = (mla, batch, cache, q, kv_b, out);
    }

    /// Whether there is [`Device::find_tokens`] for rows of `vocab` logits; without it, the host is to read the logits.
    fn finds_tokens(&self, vocab: usize) -> bool {
        let _ = vocab;
        false
    }
    /// The token of each row of `logits [R, V]`, which stay as they are. `mask`: bits of the ids that may be drawn, that of id
    /// `i` in word `i / 64`. Logprobs are the model's own; sums are such that bits do not depend on the other rows.
    ///
    /// `None`: a logit is not finite, no token may be drawn, or more is asked for than the device gives. The logits then have to
    /// be read to know which.
    ///
    /// # Errors
    /// When the device has failed.
    fn find_tokens(
        &self,
        logits: &mut Self::Buffer,
        mask: &[u64],
        asks: &[TokenAsk<'_>],
    ) -> Result<Vec<Option<FoundToken>>, KernelError> {
        let _ = (logits, mask);
        Ok(vec![None; asks.len()])
    }

    /// Memory of `bytes` zeros that another process can read, and the handle that it opens it by.
    ///
    /// # Errors
    /// When the device shares none ([`KernelError::NotShared`]) or has not as much.
    fn share(&self, bytes: usize) -> Result<(Self::Shared, Vec<u8>), KernelError> {
        let _ = bytes;
        Err(KernelError::NotShared { device: self.numerics() })
    }
    /// At least `bytes` bytes of another process's memory, to be read. That process has to keep it until this is dropped.
    ///
    /// # Errors
    /// When the device shares none, the handle is of another kind, or the memory cannot be reached or is smaller.
    fn open_shared(&self, handle: &[u8], bytes: usize) -> Result<Self::Shared, KernelError> {
        let _ = (handle, bytes);
        Err(KernelError::NotShared { device: self.numerics() })
    }
    /// Reads the beginning of shared memory, at once: not behind what was queued.
    ///
    /// # Errors
    /// When there is less of it, or the device has failed.
    fn read_shared(&self, memory: &Self::Shared, bytes: &mut [u8]) -> Result<(), KernelError> {
        let _ = (memory, bytes);
        Err(KernelError::NotShared { device: self.numerics() })
    }
    /// Makes the device's board, of `bytes` bytes, unless there is one; the handle that others open it by.
    ///
    /// # Errors
    /// As for [`Device::share`], or when there is a smaller one.
    fn make_board(&self, bytes: usize) -> Result<Vec<u8>, KernelError> {
        let _ = bytes;
        Err(KernelError::NotShared { device: self.numerics() })
    }
    /// The same where nobody else is to open it.
    ///
    /// # Errors
    /// When the device has no board, not as much memory, or a smaller one.
    fn keep_board(&self, bytes: usize) -> Result<(), KernelError> {
        let _ = bytes;
        Err(KernelError::NotLinked { device: self.numerics() })
    }
    /// Memory of `bytes` bytes as [`Device::share`] gives it, but with anything in it, and no other process can open it.
    ///
    /// # Errors
    /// When the device has none such, or not as much.
    fn keep(&self, bytes: usize) -> Result<Self::Shared, KernelError> {
        let _ = bytes;
        Err(KernelError::NotLinked { device: self.numerics() })
    }
    /// Whether the device has links to others.
    ///
    /// # Errors
    /// When it has none ([`KernelError::NotLinked`]), or lacks what they need here.
    fn check_links(&self) -> Result<(), KernelError> {
        Err(KernelError::NotLinked { device: self.numerics() })
    }
    /// A fresh id, for a link of this device with one other. The device may wait for who joins by it until the process ends.
    ///
    /// # Errors
    /// As for [`Device::check_links`].
    fn link_id(&self) -> Result<Vec<u8>, KernelError> {
        Err(KernelError::NotLinked { device: self.numerics() })
    }
    /// Joins the link of this id; waits for the other end.
    ///
    /// # Errors
    /// As for [`Device::check_links`], when the id is of another kind, or the other end does not join in time.
    fn link<'d>(
        &'d self,
        id: &[u8],
        end: LinkEnd,
        until: &Until<'_>,
    ) -> Result<Box<dyn Link<Self::Shared> + 'd>, KernelError> {
        let _ = (id, end, until);
        Err(KernelError::NotLinked { device: self.numerics() })
    }
    /// Lays `x`, rounded to the activation type, on the board; it is there for others when something that was queued later has
    /// been read. `None`: there is no board, `x` does not fit, or other rows are there that somebody may still want.
    fn publish(&self, x: &Self::Buffer) -> Option<Published> {
        let _ = x;
        None
    }
    /// As [`Device::grouped_ffn`], then the slots' sums are added up, level by level, and those that are wanted are laid down.
    /// They are there when it returns.
    ///
    /// # Errors
    /// When the device shares no memory or has failed.
    fn grouped_sums(
        &self,
        work: &GroupedSums<'_, Self::Matrix, Self::Shared>,
        wanted: &mut [Wanted<'_, Self::Shared>],
    ) -> Result<(), KernelError> {
        let _ = (work, wanted);
        Err(KernelError::NotShared { device: self.numerics() })
    }
}
