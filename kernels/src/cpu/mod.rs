//! The CPU device: bf16 weights, f32 sums, an instruction set chosen at run time.
//!
//! Activations are bf16: an operation rounds its matrix inputs once, at its entry, and sums in f32.
#![allow(unsafe_code)]

mod isa;
mod kernels;
mod mla;
mod products;
pub mod rates;

use std::sync::Arc;

pub use isa::Isa;
use kernels::Kernels;
use products::{Inputs, Product};

use crate::{
    Device, Dtype, ExpertRows, Ffn, KernelError, LatentWrite, MlaShape, Pool, RotaryTable, SequenceRows, Weight,
    arena::Arena,
    cache::LatentCache,
    grid::Grid,
    ops::{embed::embed, grouped_ffn::add_weighted},
    panels::{Panels, Rows, WIDTH},
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

    /// `x` rounded to bf16.
    fn rounded(&self, x: &[f32]) -> Scratch {
        let mut out = Scratch::take(x.len());
        let chunk = tasks::at_once(&self.pool, x.len(), 1);
        self.pool.run_chunks(&mut out, chunk, |index, out| {
            self.kernels.round(&x[index * chunk..][..out.len()], out);
        });
        out
    }

    /// `y [T, out] = x · Wᵀ`, `x` as it is.
    fn product(&self, x: Inputs<'_>, w: &Panels<u16>, y: &mut [f32]) {
        assert_eq!(x.rows * w.outputs(), y.len(), "rows of a linear layer");
        let y = Grid::new(y, w.outputs());
        products::run(&self.pool, self.kernels, &[Product { x, w: [w] }], |_, output| {
            // SAFETY: each output is handed over once.
            let y = unsafe { y.part(output.row, output.cols) };
            y.copy_from_slice(&output.values[0][..y.len()]);
        });
    }

    /// Runs `task(i, row)` for each row of `out [_, cols]`; `work` is the multiply-adds of one row.
    fn rows(&self, out: &mut [f32], cols: usize, work: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = tasks::at_once(&self.pool, out.len() / cols.max(1), work);
        self.pool.run_chunks(out, rows * cols, |chunk, out| {
            out.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| task(chunk * rows + row, out));
        });
    }

    /// The inner activations of feed-forward blocks, one block's rows after the other: `[Σ rows, I]`, rounded.
    fn inner(&self, blocks: &[Product<'_, 2>], first_rows: &[usize], width: usize) -> Scratch {
        let rows = first_rows.last().map_or(0, |first| first + blocks[blocks.len() - 1].x.rows);
        let mut inner = Scratch::take(rows * width);
        let grid = Grid::new(&mut inner, width);
        products::run(&self.pool, self.kernels, blocks, |block, output| {
            let mut product = [0.0; WIDTH];
            let [gate, up] = output.values;
            self.kernels.swiglu(gate, up, &mut product);
            // SAFETY: each output is handed over once, and each block has rows of its own.
            let inner = unsafe { grid.part(first_rows[block] + output.row, output.cols) };
            inner.copy_from_slice(&product[..inner.len()]);
        });
        inner
    }
}

impl Device for Cpu {
    type Matrix = Panels<u16>;
    type Table = Rows<u16>;
    type Cache = LatentCache<u16>;

    fn activation(&self) -> Dtype {
        Dtype::Bf16
    }

    fn numerics(&self) -> String {
        format!("cpu-{}-1", self.isa)
    }

    fn load_matrix(&self, weight: Weight<'_>) -> Result<Self::Matrix, KernelError> {
        Panels::pack(&self.arena, &self.pool, weight)
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<Self::Table, KernelError> {
        Rows::copy(&self.arena, &self.pool, weight)
    }

    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize {
        matrix.bytes()
    }

    fn matrix_shape(&self, matrix: &Self::Matrix) -> (usize, usize) {
        (matrix.outputs(), matrix.inputs())
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError> {
        LatentCache::new((layers, blocks, Self::BLOCK), shape, mla::stride(shape))
    }

    fn embed(&self, table: &Self::Table, tokens: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), tokens.len() * table.cols(), "rows of the embedding");
        self.rows(out, table.cols(), table.cols(), |row, out| embed(table, tokens[row], out));
    }

    fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
        let cols = gain.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(cols), "rows of a norm");
        self.rows(out, cols, 2 * cols, |row, out| self.kernels.rms_norm(&x[row * cols..][..cols], gain, eps, out));
    }

    fn linear(&self, x: &[f32], w: &Self::Matrix, y: &mut [f32]) {
        self.product(Inputs::new(&self.rounded(x), w.inputs()), w, y);
    }

    fn gate_logits(&self, x: &[f32], w: &Self::Matrix, y: &mut [f32]) {
        self.product(Inputs::new(x, w.inputs()), w, y);
    }

    fn ffn(&self, x: &[f32], ffn: &Ffn<Self::Matrix>, y: &mut [f32]) {
        let x = self.rounded(x);
        let block = Product { x: Inputs::new(&x, ffn.gate.inputs()), w: [&ffn.gate, &ffn.up] };
        let width = ffn.gate.outputs();
        let inner = self.inner(&[block], &[0], width);
        self.product(Inputs::new(&inner, width), &ffn.down, y);
    }

    fn grouped_ffn(&self, x: &[f32], experts: &[ExpertRows<'_, Self::Matrix>], out: &mut [f32]) {
        let Some(first) = experts.first() else { return };
        let (hidden, width) = (first.ffn.gate.inputs(), first.ffn.gate.outputs());
        let x = self.rounded(x);
        let mut first_rows = Vec::with_capacity(experts.len());
        let mut blocks = Vec::with_capacity(experts.len());
        let mut rows = 0;
        for expert in experts {
            first_rows.push(rows);
            rows += expert.rows.len();
            let picked = Inputs { rows: expert.rows.len(), picked: Some(expert.rows), ..Inputs::new(&x, hidden) };
            blocks.push(Product { x: picked, w: [&expert.ffn.gate, &expert.ffn.up] });
        }
        let inner = self.inner(&blocks, &first_rows, width);

        // A task owns some columns of all slots, and takes the experts one after the other.
        let panels = hidden.div_ceil(WIDTH);
        let at_once = tasks::at_once(&self.pool, panels, rows * width * WIDTH);
        let out = Grid::new(out, hidden);
        self.pool.run(panels.div_ceil(at_once), |task| {
            for (expert, first_row) in experts.iter().zip(&first_rows) {
                let rows = Inputs::new(&inner[first_row * width..][..expert.rows.len() * width], width);
                let down = Product { x: rows, w: [&expert.ffn.down] };
                let panels = task * at_once..panels.min((task + 1) * at_once);
                down.panels(self.kernels, panels, |output| {
                    let (slot, weight) = (expert.slots[output.row] as usize, expert.weights[output.row]);
                    // SAFETY: these columns belong to this task, which holds no other part of them now.
                    add_weighted(weight, output.values[0], unsafe { out.part(slot, output.cols) });
                });
            }
        });
    }

    fn mla_queries(
        &self,
        shape: &MlaShape,
        q: &[f32],
        uk: &[Self::Matrix],
        rotary: &RotaryTable,
        positions: &[u32],
        out: &mut [f32],
    ) {
        self.queries(shape, (q, uk), (rotary, positions), out);
    }

    fn write_latents(&self, cache: &mut Self::Cache, layer: usize, write: &LatentWrite<'_>) {
        self.latents(cache, layer, write);
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
        self.attention((cache, layer), q, sequences, scale, out);
    }

    fn mla_values(&self, shape: &MlaShape, o_lat: &[f32], uv: &[Self::Matrix], out: &mut [f32]) {
        self.values(shape, o_lat, uv, out);
    }
}
