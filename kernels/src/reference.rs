//! The reference device: the definitions, spread over threads. Activations are f32, weights stay in their stored type.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Device, Dtype, ExpertRows, Ffn, KernelError, LatentWrite, MlaShape, Pool, RotaryTable, SequenceRows, Weight,
    arena::Arena,
    cache::LatentCache,
    grid::Grid,
    ops::{
        attention::{self, HEADS},
        embed::embed,
        grouped_ffn::add_weighted,
        latents::latent,
        linear::Matrix,
        queries::query,
        rms_norm::rms_norm,
        swiglu::swiglu,
        values::value,
    },
    panels::{Panels, Rows, WIDTH},
    scratch::Scratch,
    tasks,
};

/// The definitions of the operations as a device.
pub struct Reference {
    pool: Arc<Pool>,
    arena: Arena,
}

/// An embedding table in the type it is stored in.
pub enum Table {
    /// f32 as stored.
    F32(Rows<f32>),
    /// bf16 as stored.
    Bf16(Rows<u16>),
}

impl Reference {
    /// A reference device that computes on `pool`.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, arena: Arena::default() }
    }

    /// Runs `task(i, row)` for each row of `out [_, cols]`; `work` is the multiply-adds of one row.
    fn rows(&self, out: &mut [f32], cols: usize, work: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = tasks::at_once(&self.pool, out.len() / cols.max(1), work);
        self.pool.run_chunks(out, rows * cols, |chunk, out| {
            out.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| task(chunk * rows + row, out));
        });
    }

    /// `y [T, out] = x [T, in] · Wᵀ`
    fn product(&self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        let (outputs, inputs) = w.shape();
        let rows = y.len() / outputs.max(1);
        assert_eq!((x.len(), y.len()), (rows * inputs, rows * outputs), "rows of a linear layer");
        let y = Grid::new(y, outputs);
        let panels = w.panels();
        let at_once = tasks::at_once(&self.pool, panels, rows * inputs * WIDTH);
        self.pool.run(panels.div_ceil(at_once), |task| {
            for panel in task * at_once..panels.min((task + 1) * at_once) {
                let cols = panel * WIDTH..outputs.min((panel + 1) * WIDTH);
                for (row, x) in x.chunks_exact(inputs).enumerate() {
                    // SAFETY: each panel's columns belong to one task.
                    let y = unsafe { y.part(row, cols.clone()) };
                    y.copy_from_slice(&w.panel(x, panel)[..y.len()]);
                }
            }
        });
    }
}

impl Device for Reference {
    type Matrix = Matrix;
    type Table = Table;
    type Cache = LatentCache<f32>;

    fn activation(&self) -> Dtype {
        Dtype::F32
    }

    fn numerics(&self) -> String {
        "reference-1".to_owned()
    }

    fn load_matrix(&self, weight: Weight<'_>) -> Result<Matrix, KernelError> {
        Ok(match weight.dtype {
            Dtype::F32 => Matrix::F32(Panels::pack(&self.arena, &self.pool, weight)?),
            Dtype::Bf16 => Matrix::Bf16(Panels::pack(&self.arena, &self.pool, weight)?),
        })
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<Table, KernelError> {
        Ok(match weight.dtype {
            Dtype::F32 => Table::F32(Rows::copy(&self.arena, &self.pool, weight)?),
            Dtype::Bf16 => Table::Bf16(Rows::copy(&self.arena, &self.pool, weight)?),
        })
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn matrix_shape(&self, matrix: &Matrix) -> (usize, usize) {
        matrix.shape()
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError> {
        LatentCache::new((layers, blocks, Self::BLOCK), shape, shape.cached())
    }

    fn embed(&self, table: &Table, tokens: &[u32], out: &mut [f32]) {
        let cols = match table {
            Table::F32(rows) => rows.cols(),
            Table::Bf16(rows) => rows.cols(),
        };
        assert_eq!(out.len(), tokens.len() * cols, "rows of the embedding");
        self.rows(out, cols, cols, |row, out| match table {
            Table::F32(rows) => embed(rows, tokens[row], out),
            Table::Bf16(rows) => embed(rows, tokens[row], out),
        });
    }

    fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
        let cols = gain.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(cols), "rows of a norm");
        self.rows(out, cols, 2 * cols, |row, out| rms_norm(&x[row * cols..][..cols], gain, eps, out));
    }

    fn linear(&self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        self.product(x, w, y);
    }

    fn gate_logits(&self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        self.product(x, w, y);
    }

    fn ffn(&self, x: &[f32], ffn: &Ffn<Matrix>, y: &mut [f32]) {
        let (inner, inputs) = ffn.gate.shape();
        assert_eq!(ffn.up.shape(), ffn.gate.shape(), "gate and up of one block");
        let rows = x.len() / inputs.max(1);
        let mut hidden = Scratch::take(rows * inner);
        let mut up = Scratch::take(rows * inner);
        self.product(x, &ffn.gate, &mut hidden);
        self.product(x, &ffn.up, &mut up);
        hidden.iter_mut().zip(&*up).for_each(|(gate, up)| *gate = swiglu(*gate, *up));
        self.product(&hidden, &ffn.down, y);
    }

    fn grouped_ffn(&self, x: &[f32], experts: &[ExpertRows<'_, Matrix>], out: &mut [f32]) {
        for expert in experts {
            let (_, hidden) = expert.ffn.gate.shape();
            let mut gathered = Scratch::take(expert.rows.len() * hidden);
            let mut y = Scratch::take(expert.rows.len() * hidden);
            for (to, row) in gathered.chunks_exact_mut(hidden).zip(expert.rows) {
                to.copy_from_slice(&x[*row as usize * hidden..][..hidden]);
            }
            self.ffn(&gathered, expert.ffn, &mut y);
            for ((y, weight), slot) in y.chunks_exact(hidden).zip(expert.weights).zip(expert.slots) {
                add_weighted(*weight, y, &mut out[*slot as usize * hidden..][..hidden]);
            }
        }
    }

    fn mla_queries(
        &self,
        shape: &MlaShape,
        q: &[f32],
        uk: &[Matrix],
        rotary: &RotaryTable,
        positions: &[u32],
        out: &mut [f32],
    ) {
        let width = shape.nope + shape.rope;
        assert_eq!((q.len(), uk.len()), (positions.len() * shape.heads * width, shape.heads), "queries");
        assert_eq!(out.len(), positions.len() * shape.heads * shape.cached(), "absorbed queries");
        self.rows(out, shape.cached(), shape.latent * shape.nope, |index, out| {
            let (row, head) = (index / shape.heads, index % shape.heads);
            query(&q[index * width..][..width], &uk[head], rotary.at(positions[row], shape.rope / 2), out);
        });
    }

    fn write_latents(&self, cache: &mut Self::Cache, layer: usize, write: &LatentWrite<'_>) {
        let (width, half) = (cache.shape().cached(), cache.shape().rope / 2);
        assert_eq!(write.kv.len(), write.slots.len() * width, "rows of latents");
        for (row, (kv, slot)) in write.kv.chunks_exact(width).zip(write.slots).enumerate() {
            let rotation = write.rotary.at(write.positions[row], half);
            latent(kv, write.gain, rotation, cache.row_mut(layer, *slot));
        }
    }

    fn mla_attention(
        &self,
        cache: &Self::Cache,
        layer: usize,
        q: &[f32],
        sequences: &[SequenceRows<'_>],
        scale: f32,
        out: &mut [f32],
    ) {
        let MlaShape { heads, latent, .. } = *cache.shape();
        let width = cache.shape().cached();
        assert_eq!((q.len() / width, q.len() % width), (out.len() / latent, 0), "rows of attention");
        let out = Grid::new(out, latent);
        let groups = heads.div_ceil(HEADS);
        let rows: Vec<(&SequenceRows<'_>, usize)> =
            sequences.iter().flat_map(|sequence| (0..sequence.rows).map(move |row| (sequence, row))).collect();
        self.pool.run(rows.len() * groups, |task| {
            let ((sequence, row), group) = (rows[task / groups], task % groups);
            let first = (sequence.first_row + row) * heads + group * HEADS;
            let used = HEADS.min(heads - group * HEADS);
            let q = &q[first * width..][..used * width];
            let splits = splits(cache, layer, sequence, sequence.first_position + row + 1, q, scale);
            for head in 0..used {
                // SAFETY: each row and head belongs to one task.
                let out = unsafe { out.part(first + head, 0..latent) };
                attention::merge_splits(splits.chunks_exact(latent + 2).skip(head).step_by(used), out);
            }
        });
    }

    fn mla_values(&self, shape: &MlaShape, o_lat: &[f32], uv: &[Matrix], out: &mut [f32]) {
        assert_eq!(o_lat.len() / shape.latent, out.len() / shape.value, "rows of values");
        self.rows(out, shape.value, shape.latent * shape.value, |index, out| {
            value(&o_lat[index * shape.latent..][..shape.latent], &uv[index % shape.heads], out);
        });
    }
}

/// Reduces the first `keys` positions of a sequence for up to eight heads of one row: `[splits, heads, r + 2]`.
fn splits(
    cache: &LatentCache<f32>,
    layer: usize,
    sequence: &SequenceRows<'_>,
    keys: usize,
    q: &[f32],
    scale: f32,
) -> Scratch {
    const BLOCK: usize = Reference::BLOCK;
    let (latent, width) = (cache.shape().latent, cache.shape().cached());
    let mut interleaved = Vec::new();
    attention::interleave(q, width, &mut interleaved);
    let part = q.len() / width * (latent + 2);
    let mut out = Scratch::take(keys.div_ceil(Reference::SPLIT) * part);
    let mut scores = Vec::new();
    for (split, out) in out.chunks_exact_mut(part).enumerate() {
        let first = split * Reference::SPLIT;
        let last = keys.min(first + Reference::SPLIT);
        let rows = (first..last).step_by(BLOCK).flat_map(|at| {
            cache.block(layer, sequence.blocks[at / BLOCK], BLOCK.min(last - at)).chunks_exact(cache.stride())
        });
        attention::reduce_split(&interleaved, rows, scale, &mut scores, out, latent);
    }
    out
}
