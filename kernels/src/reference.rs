//! The reference device: the definitions, spread over threads. Activations are f32, weights stay in their stored type.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Device, Dtype, ExpertRows, Ffn, KernelError, LatentWrite, Mla, MlaShape, NotShared, Pool, RotaryTable, RowSpan,
    StepRows, Weight, activation,
    arena::Arena,
    cache::LatentCache,
    grid::Grid,
    host::{self, fit},
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

    /// `y [T, H]` of a feed-forward block for `x [T, H]`.
    fn block(&self, x: &[f32], ffn: &Ffn<Matrix>, y: &mut [f32]) {
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
}

impl Device for Reference {
    type Matrix = Matrix;
    type Heads = Vec<Matrix>;
    type Table = Table;
    type Rotary = RotaryTable;
    type Cache = LatentCache<f32>;
    type Buffer = Vec<f32>;
    type Batch = StepRows;
    type Fetched = (Vec<u8>, Vec<f32>);
    type Shared = NotShared;

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

    fn load_heads(&self, heads: &[Weight<'_>]) -> Result<Vec<Matrix>, KernelError> {
        heads.iter().map(|head| self.load_matrix(*head)).collect()
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<Table, KernelError> {
        Ok(match weight.dtype {
            Dtype::F32 => Table::F32(Rows::copy(&self.arena, &self.pool, weight)?),
            Dtype::Bf16 => Table::Bf16(Rows::copy(&self.arena, &self.pool, weight)?),
        })
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vec<f32>, KernelError> {
        Ok(values)
    }

    fn load_rotary(&self, table: RotaryTable) -> Result<RotaryTable, KernelError> {
        Ok(table)
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError> {
        LatentCache::new((layers, blocks, Self::BLOCK), shape, shape.cached())
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn matrix_shape(&self, matrix: &Matrix) -> (usize, usize) {
        matrix.shape()
    }

    fn length(&self, buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn load_batch(&self, rows: StepRows, batch: &mut StepRows) {
        *batch = rows;
    }

    fn read(&self, x: &mut Vec<f32>, values: &mut Vec<f32>) -> Result<(), KernelError> {
        std::mem::swap(x, values);
        Ok(())
    }

    fn fetch(&self, x: &Vec<f32>, y: &mut Vec<f32>) -> Self::Fetched {
        (activation::encode(self.activation(), x), std::mem::take(y))
    }

    fn take(&self, fetched: Self::Fetched) -> Result<Self::Fetched, KernelError> {
        Ok(fetched)
    }

    fn decode(&self, x: &[u8], out: &mut Vec<f32>) {
        host::decode(self.activation(), x, out);
    }

    fn gather(&self, parts: &[(&Vec<f32>, &[u32])], width: usize, out: &mut Vec<f32>) {
        host::gather(parts, width, out);
    }

    fn add(&self, x: &mut Vec<f32>, delta: &Vec<f32>) {
        host::add(x, delta);
    }

    fn add_two(&self, x: &mut Vec<f32>, a: &Vec<f32>, b: &Vec<f32>) {
        host::add_two(x, a, b);
    }

    fn embed(&self, table: &Table, batch: &StepRows, out: &mut Vec<f32>) {
        let cols = match table {
            Table::F32(rows) => rows.cols(),
            Table::Bf16(rows) => rows.cols(),
        };
        self.rows(fit(out, batch.len() * cols), cols, cols, |row, out| match table {
            Table::F32(rows) => embed(rows, batch.tokens[row], out),
            Table::Bf16(rows) => embed(rows, batch.tokens[row], out),
        });
    }

    fn rms_norm(&self, x: &Vec<f32>, gain: &Vec<f32>, eps: f32, out: &mut Vec<f32>) {
        let cols = gain.len();
        assert!(x.len().is_multiple_of(cols), "rows of a norm");
        let out = fit(out, x.len());
        self.rows(out, cols, 2 * cols, |row, out| rms_norm(&x[row * cols..][..cols], gain, eps, out));
    }

    fn linear(&self, x: &Vec<f32>, w: &Matrix, y: &mut Vec<f32>) {
        let (outputs, inputs) = w.shape();
        self.product(x, w, fit(y, x.len() / inputs.max(1) * outputs));
    }

    fn gate_logits(&self, x: &Vec<f32>, w: &Matrix, y: &mut Vec<f32>) {
        self.linear(x, w, y);
    }

    fn ffn(&self, x: &Vec<f32>, ffn: &Ffn<Matrix>, y: &mut Vec<f32>) {
        let ((outputs, _), (_, inputs)) = (ffn.down.shape(), ffn.gate.shape());
        self.block(x, ffn, fit(y, x.len() / inputs.max(1) * outputs));
    }

    fn grouped_ffn(
        &self,
        x: &[&[u8]],
        experts: &[ExpertRows<'_, Matrix>],
        sums: &mut [f32],
    ) -> Result<(), KernelError> {
        let x = host::decode_parts(Dtype::F32, x);
        sums.fill(0.0);
        for expert in experts {
            let (_, hidden) = expert.ffn.gate.shape();
            let mut gathered = Scratch::take(expert.rows.len() * hidden);
            let mut y = Scratch::take(expert.rows.len() * hidden);
            for (to, row) in gathered.chunks_exact_mut(hidden).zip(expert.rows) {
                to.copy_from_slice(&x[*row as usize * hidden..][..hidden]);
            }
            self.block(&gathered, expert.ffn, &mut y);
            for ((y, weight), slot) in y.chunks_exact(hidden).zip(expert.weights).zip(expert.slots) {
                add_weighted(*weight, y, &mut sums[*slot as usize * hidden..][..hidden]);
            }
        }
        Ok(())
    }

    fn pool(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn mla_queries(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        q: &Vec<f32>,
        uk: &Vec<Matrix>,
        out: &mut Vec<f32>,
    ) {
        let shape = &mla.shape;
        let width = shape.nope + shape.rope;
        assert_eq!((q.len(), uk.len()), (batch.len() * shape.heads * width, shape.heads), "queries");
        let out = fit(out, batch.len() * shape.heads * shape.cached());
        self.rows(out, shape.cached(), shape.latent * shape.nope, |index, out| {
            let (row, head) = (index / shape.heads, index % shape.heads);
            let rotation = mla.rotary.at(batch.positions[row], shape.rope / 2);
            query(&q[index * width..][..width], &uk[head], rotation, out);
        });
    }

    fn write_latents(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        write: &LatentWrite<'_, Vec<f32>>,
        cache: &mut Self::Cache,
    ) {
        let (width, half) = (mla.shape.cached(), mla.shape.rope / 2);
        assert_eq!(write.kv.len(), batch.len() * width, "rows of latents");
        for ((kv, slot), position) in write.kv.chunks_exact(width).zip(&batch.slots).zip(&batch.positions) {
            latent(kv, write.gain, mla.rotary.at(*position, half), cache.row_mut(write.layer, *slot));
        }
    }

    fn mla_attention(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        (cache, layer): (&Self::Cache, usize),
        q: &Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        let MlaShape { heads, latent, .. } = mla.shape;
        let width = mla.shape.cached();
        assert_eq!(q.len(), batch.len() * heads * width, "rows of attention");
        let out = Grid::new(fit(out, batch.len() * heads * latent), latent);
        let groups = heads.div_ceil(HEADS);
        let rows: Vec<(&RowSpan, usize)> =
            batch.spans.iter().flat_map(|span| (0..span.rows).map(move |row| (span, row))).collect();
        self.pool.run(rows.len() * groups, |task| {
            let ((span, row), group) = (rows[task / groups], task % groups);
            let first = (span.first_row + row) * heads + group * HEADS;
            let used = HEADS.min(heads - group * HEADS);
            let q = &q[first * width..][..used * width];
            let splits = splits((cache, layer), &span.blocks, span.first_position + row + 1, q, mla.scale);
            for head in 0..used {
                // SAFETY: each row and head belongs to one task.
                let out = unsafe { out.part(first + head, 0..latent) };
                let splits = splits.chunks_exact(latent + 2).skip(head).step_by(used);
                attention::merge_splits(splits.map(|split| split.split_at(2)), out);
            }
        });
    }

    fn mla_values(&self, mla: &Mla<RotaryTable>, _: &StepRows, o_lat: &Vec<f32>, uv: &Vec<Matrix>, out: &mut Vec<f32>) {
        let MlaShape { heads, value: width, latent, .. } = mla.shape;
        let out = fit(out, o_lat.len() / latent * width);
        self.rows(out, width, latent * width, |index, out| {
            value(&o_lat[index * latent..][..latent], &uv[index % heads], out);
        });
    }
}

/// Reduces the first `keys` positions of a sequence for up to eight heads of one row: `[splits, heads, r + 2]`.
fn splits((cache, layer): (&LatentCache<f32>, usize), blocks: &[u32], keys: usize, q: &[f32], scale: f32) -> Scratch {
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
        let rows = (first..last)
            .step_by(BLOCK)
            .flat_map(|at| cache.block(layer, blocks[at / BLOCK], BLOCK.min(last - at)).chunks_exact(cache.stride()));
        attention::reduce_split(&interleaved, rows, scale, &mut scores, out, latent);
    }
    out
}
