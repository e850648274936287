//! The CPU device: weights in bf16 or FP8, f32 sums, an instruction set chosen at run time.
//!
//! Activations are bf16: an operation rounds its matrix inputs once, at its entry, and sums in f32.
#![allow(unsafe_code)]

mod attention;
mod expanded;
mod inputs;
mod isa;
mod kernels;
mod matrix;
mod mla;
mod products;
mod rates;
mod scaled;
mod sink;
mod split;
mod strips;

use std::{ops::Range, sync::Arc};

use expanded::Expanded;
use inputs::{Inputs, Packed};
pub use isa::Isa;
use kernels::Kernels;
pub(crate) use matrix::CpuMatrix;
use products::Product;
pub use rates::CpuRates;

use crate::{
    Device, Dtype, ExpertRows, Ffn, Fp8Weights, KernelError, LatentWrite, Mla, MlaShape, NotShared, Pool, RotaryTable,
    StepRows, Weight, activation,
    arena::Arena,
    cache::LatentCache,
    grid::Grid,
    host::{self, fit},
    ops::{embed::embed, grouped_ffn::add_weighted},
    panels::{Rows, WIDTH},
    scratch::Scratch,
    tasks,
};

/// The processor as a device.
pub struct Cpu {
    pool: Arc<Pool>,
    isa: Isa,
    kernels: &'static dyn Kernels,
    arena: Arena,
}

impl Cpu {
    /// A device that computes on `pool` with the given instruction set, or the best one of this machine.
    ///
    /// # Errors
    /// When this machine lacks the instruction set.
    pub fn new(pool: Arc<Pool>, isa: Option<Isa>) -> Result<Self, KernelError> {
        let isa = match isa {
            Some(isa) => isa.check()?,
            None => Isa::available()[0],
        };
        Ok(Self { pool, isa, kernels: kernels::of(isa), arena: Arena::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Inputs of products with these matrices, rounded to `dtype` and packed.
    fn packed<'m>(
        &self,
        dtype: Dtype,
        matrices: impl IntoIterator<Item = &'m CpuMatrix>,
        inputs: &[Inputs<'_>],
    ) -> Packed<'_> {
        let tiles = self.kernels.tiles(dtype);
        let strip = matrices.into_iter().map(|matrix| matrix.strip(tiles)).min().unwrap_or(tiles.strip());
        Packed::new(&self.pool, tiles, strip, inputs)
    }

    /// `y [T, out] = round(x) · Wᵀ`, `x` rounded to `dtype`.
    fn product(&self, x: Inputs<'_>, dtype: Dtype, w: &CpuMatrix, y: &mut [f32]) {
        assert_eq!((x.width, x.rows * w.outputs()), (w.inputs(), y.len()), "rows of a linear layer");
        let y = Grid::new(y, w.outputs());
        let x = self.packed(dtype, [w], &[x]);
        products::run(&self.pool, &[Product { x: x.of(0), w: [w] }], |_, outputs| {
            for (row, [values]) in outputs.rows() {
                // SAFETY: each output is handed over once.
                let y = unsafe { y.part(row, outputs.cols.clone()) };
                products::put(values, y);
            }
        });
    }

    /// Runs `task(i, row)` for each row of `out [_, cols]`; `work` is the multiply-adds of one row.
    fn rows(&self, out: &mut [f32], cols: usize, work: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = tasks::at_once(&self.pool, out.len() / cols.max(1), work);
        self.pool.run_chunks(out, rows * cols, |chunk, out| {
            out.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| task(chunk * rows + row, out));
        });
    }

    /// The inner activations of feed-forward blocks of one width: `inner[i] [rows, I]` for block `i`.
    fn inner(&self, blocks: &[Product<'_, 2>], inner: &[Grid<'_, f32>]) {
        products::run(&self.pool, blocks, |block, outputs| {
            for (row, [gate, up]) in outputs.rows() {
                let mut product = [0.0; WIDTH];
                self.kernels.swiglu(gate, up, &mut product);
                // SAFETY: each output is handed over once.
                let inner = unsafe { inner[block].part(row, outputs.cols.clone()) };
                products::put(&product, inner);
            }
        });
    }

    /// `out [S, H]` rounded: the sum of `weight · ffn(x[row])` over each expert in turn and each of its rows. `x [R, H]`
    fn experts(&self, x: &[f32], experts: &[ExpertRows<'_, CpuMatrix>], out: &mut [f32]) {
        let Some(first) = experts.first() else { return out.fill(0.0) };
        let (hidden, width) = (first.ffn.gate.inputs(), first.ffn.gate.outputs());
        let picked: Vec<Inputs<'_>> = experts
            .iter()
            .map(|expert| Inputs { rows: expert.rows.len(), picked: Some(expert.rows), ..Inputs::new(x, hidden) })
            .collect();
        let rows: usize = picked.iter().map(|picked| picked.rows).sum();
        let mut inner = Scratch::take(rows * width);
        {
            let matrices = experts.iter().flat_map(|expert| [&expert.ffn.gate, &expert.ffn.up]);
            let x = self.packed(Dtype::Bf16, matrices, &picked);
            let blocks: Vec<Product<'_, 2>> = experts
                .iter()
                .enumerate()
                .map(|(index, expert)| Product { x: x.of(index), w: [&expert.ffn.gate, &expert.ffn.up] })
                .collect();
            let grids: Vec<Grid<'_, f32>> =
                split(&mut inner, &picked, width).map(|inner| Grid::new(inner, width)).collect();
            self.inner(&blocks, &grids);
        }
        let inner: Vec<Inputs<'_>> = split(&mut inner, &picked, width).map(|inner| Inputs::new(inner, width)).collect();
        let inner = self.packed(Dtype::Bf16, experts.iter().map(|expert| &expert.ffn.down), &inner);

        // A task owns some columns of all slots, and takes the experts one after the other.
        let panels = hidden.div_ceil(WIDTH);
        let at_once = tasks::at_once(&self.pool, panels, rows * width * WIDTH);
        let slots = out.len() / hidden;
        let out = Grid::new(out, hidden);
        self.pool.run(panels.div_ceil(at_once), |task| {
            let panels = task * at_once..panels.min((task + 1) * at_once);
            let cols = panels.start * WIDTH..hidden.min(panels.end * WIDTH);
            // SAFETY: these columns belong to this task, which holds no other part of them at the time.
            let part = |slot: usize, cols: Range<usize>| unsafe { out.part(slot, cols) };
            (0..slots).for_each(|slot| part(slot, cols.clone()).fill(0.0));
            for (index, expert) in experts.iter().enumerate() {
                let down = Product { x: inner.of(index), w: [&expert.ffn.down] };
                down.panels(panels.clone(), |outputs| {
                    for (row, [values]) in outputs.rows() {
                        let (slot, weight) = (expert.slots[row] as usize, expert.weights[row]);
                        add_weighted(weight, values, part(slot, outputs.cols.clone()));
                    }
                });
            }
            (0..slots).for_each(|slot| activation::round(Dtype::Bf16, part(slot, cols.clone())));
        });
    }
}

impl Device for Cpu {
    type Matrix = CpuMatrix;
    type Heads = Vec<CpuMatrix>;
    type Table = Rows<u16>;
    type Rotary = RotaryTable;
    type Cache = LatentCache<u16>;
    type Buffer = Vec<f32>;
    type Batch = StepRows;
    type Fetched = (Vec<u8>, Vec<f32>);
    type Shared = NotShared;

    fn activation(&self) -> Dtype {
        Dtype::Bf16
    }

    fn numerics(&self) -> String {
        format!("cpu-{}-3", self.isa)
    }

    fn fp8_weights(&self) -> Fp8Weights {
        Fp8Weights::Kept
    }

    fn load_matrix(&self, weight: Weight<'_>) -> Result<Self::Matrix, KernelError> {
        CpuMatrix::load(&self.arena, &self.pool, weight)
    }

    fn load_heads(&self, heads: &[Weight<'_>]) -> Result<Self::Heads, KernelError> {
        heads.iter().map(|head| CpuMatrix::widened(&self.arena, &self.pool, *head)).collect()
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<Self::Table, KernelError> {
        Rows::copy(&self.arena, &self.pool, weight)
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vec<f32>, KernelError> {
        Ok(values)
    }

    fn load_rotary(&self, table: RotaryTable) -> Result<RotaryTable, KernelError> {
        Ok(table)
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError> {
        LatentCache::new((layers, blocks, Self::BLOCK), shape, attention::stride(shape))
    }

    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize {
        matrix.bytes()
    }

    fn matrix_shape(&self, matrix: &Self::Matrix) -> (usize, usize) {
        (matrix.outputs(), matrix.inputs())
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

    fn embed(&self, table: &Self::Table, batch: &StepRows, out: &mut Vec<f32>) {
        let cols = table.cols();
        self.rows(fit(out, batch.len() * cols), cols, cols, |row, out| embed(table, batch.tokens[row], out));
    }

    fn rms_norm(&self, x: &Vec<f32>, gain: &Vec<f32>, eps: f32, out: &mut Vec<f32>) {
        let cols = gain.len();
        assert!(x.len().is_multiple_of(cols), "rows of a norm");
        let out = fit(out, x.len());
        self.rows(out, cols, 2 * cols, |row, out| self.kernels.rms_norm(&x[row * cols..][..cols], gain, eps, out));
    }

    fn linear(&self, x: &Vec<f32>, w: &Self::Matrix, y: &mut Vec<f32>) {
        let x = Inputs::new(x, w.inputs());
        self.product(x, Dtype::Bf16, w, fit(y, x.rows * w.outputs()));
    }

    fn gate_logits(&self, x: &Vec<f32>, w: &Self::Matrix, y: &mut Vec<f32>) {
        let x = Inputs::new(x, w.inputs());
        self.product(x, Dtype::F32, w, fit(y, x.rows * w.outputs()));
    }

    fn ffn(&self, x: &Vec<f32>, ffn: &Ffn<Self::Matrix>, y: &mut Vec<f32>) {
        let (hidden, width) = (ffn.gate.inputs(), ffn.gate.outputs());
        let x = self.packed(Dtype::Bf16, [&ffn.gate, &ffn.up], &[Inputs::new(x, hidden)]);
        let rows = x.of(0).rows();
        let mut inner = Scratch::take(rows * width);
        self.inner(&[Product { x: x.of(0), w: [&ffn.gate, &ffn.up] }], &[Grid::new(&mut inner, width)]);
        drop(x);
        self.product(Inputs::new(&inner, width), Dtype::Bf16, &ffn.down, fit(y, rows * ffn.down.outputs()));
    }

    fn grouped_ffn(
        &self,
        x: &[&[u8]],
        experts: &[ExpertRows<'_, Self::Matrix>],
        sums: &mut [f32],
    ) -> Result<(), KernelError> {
        self.experts(&host::decode_parts(Dtype::Bf16, x), experts, sums);
        Ok(())
    }

    fn mla_queries(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        q: &Vec<f32>,
        uk: &Self::Heads,
        out: &mut Vec<f32>,
    ) {
        let out = fit(out, batch.len() * mla.shape.heads * mla.shape.cached());
        self.queries(mla, batch, q, uk, out);
    }

    fn write_latents(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        write: &LatentWrite<'_, Vec<f32>>,
        cache: &mut Self::Cache,
    ) {
        self.latents(mla, batch, write, cache);
    }

    fn mla_attention(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        cache: (&Self::Cache, usize),
        q: &Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        let out = fit(out, batch.len() * mla.shape.heads * mla.shape.latent);
        self.attention(cache, q, &batch.spans, mla.scale, out);
    }

    fn mla_values(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        o_lat: &Vec<f32>,
        uv: &Self::Heads,
        out: &mut Vec<f32>,
    ) {
        let MlaShape { value, latent, .. } = mla.shape;
        self.values(&mla.shape, batch, o_lat, uv, fit(out, o_lat.len() / latent * value));
    }

    fn pool(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn expands(&self) -> bool {
        true
    }

    fn mla_expanded(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        cache: (&Self::Cache, usize),
        q: &Vec<f32>,
        kv_b: &Self::Matrix,
        out: &mut Vec<f32>,
    ) {
        for span in batch.spans.iter().filter(|span| span.expanded) {
            Expanded { cpu: self, mla, cache, kv_b }.attend(span, q, out);
        }
    }
}

/// The rows of each expert among `rows [_, width]`.
fn split<'a>(rows: &'a mut [f32], experts: &[Inputs<'_>], width: usize) -> impl Iterator<Item = &'a mut [f32]> {
    let mut rest = rows;
    experts.iter().map(move |expert| rest.split_off_mut(..expert.rows * width).unwrap_or_default())
}
