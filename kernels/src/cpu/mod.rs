//! The CPU device: bf16 weights, f32 sums, an instruction set chosen at run time.
//!
//! Activations are bf16: an operation rounds its matrix inputs once, at its entry, and sums in f32.
#![allow(unsafe_code)]

mod attention;
mod inputs;
mod isa;
mod kernels;
mod mla;
mod products;
pub mod rates;
mod split;

use std::sync::Arc;

use inputs::{Inputs, Packed};
pub use isa::Isa;
use kernels::Kernels;
use products::Product;

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

    /// Inputs of products, rounded to `dtype` and packed.
    fn packed(&self, dtype: Dtype, inputs: &[Inputs<'_>]) -> Packed<'_> {
        Packed::new(&self.pool, self.kernels.tiles(dtype), inputs)
    }

    /// `y [T, out] = round(x) · Wᵀ`, `x` rounded to `dtype`.
    fn product(&self, x: Inputs<'_>, dtype: Dtype, w: &Panels<u16>, y: &mut [f32]) {
        assert_eq!((x.width, x.rows * w.outputs()), (w.inputs(), y.len()), "rows of a linear layer");
        let y = Grid::new(y, w.outputs());
        let x = self.packed(dtype, &[x]);
        products::run(&self.pool, &[Product { x: x.of(0), w: [w] }], |_, outputs| {
            for (row, [values]) in outputs.rows() {
                // SAFETY: each output is handed over once.
                let y = unsafe { y.part(row, outputs.cols.clone()) };
                y.copy_from_slice(&values[..y.len()]);
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
                inner.copy_from_slice(&product[..inner.len()]);
            }
        });
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
        format!("cpu-{}-2", self.isa)
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
        LatentCache::new((layers, blocks, Self::BLOCK), shape, attention::stride(shape))
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
        self.product(Inputs::new(x, w.inputs()), Dtype::Bf16, w, y);
    }

    fn gate_logits(&self, x: &[f32], w: &Self::Matrix, y: &mut [f32]) {
        self.product(Inputs::new(x, w.inputs()), Dtype::F32, w, y);
    }

    fn ffn(&self, x: &[f32], ffn: &Ffn<Self::Matrix>, y: &mut [f32]) {
        let (hidden, width) = (ffn.gate.inputs(), ffn.gate.outputs());
        let x = self.packed(Dtype::Bf16, &[Inputs::new(x, hidden)]);
        let mut inner = Scratch::take(x.of(0).rows() * width);
        self.inner(&[Product { x: x.of(0), w: [&ffn.gate, &ffn.up] }], &[Grid::new(&mut inner, width)]);
        drop(x);
        self.product(Inputs::new(&inner, width), Dtype::Bf16, &ffn.down, y);
    }

    fn grouped_ffn(&self, x: &[f32], experts: &[ExpertRows<'_, Self::Matrix>], out: &mut [f32]) {
        let Some(first) = experts.first() else { return };
        let (hidden, width) = (first.ffn.gate.inputs(), first.ffn.gate.outputs());
        let picked: Vec<Inputs<'_>> = experts
            .iter()
            .map(|expert| Inputs { rows: expert.rows.len(), picked: Some(expert.rows), ..Inputs::new(x, hidden) })
            .collect();
        let rows: usize = picked.iter().map(|picked| picked.rows).sum();
        let mut inner = Scratch::take(rows * width);
        {
            let x = self.packed(Dtype::Bf16, &picked);
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
        let inner = self.packed(Dtype::Bf16, &inner);

        // A task owns some columns of all slots, and takes the experts one after the other.
        let panels = hidden.div_ceil(WIDTH);
        let at_once = tasks::at_once(&self.pool, panels, rows * width * WIDTH);
        let out = Grid::new(out, hidden);
        self.pool.run(panels.div_ceil(at_once), |task| {
            for (index, expert) in experts.iter().enumerate() {
                let down = Product { x: inner.of(index), w: [&expert.ffn.down] };
                down.panels(task * at_once..panels.min((task + 1) * at_once), |outputs| {
                    for (row, [values]) in outputs.rows() {
                        let (slot, weight) = (expert.slots[row] as usize, expert.weights[row]);
                        // SAFETY: these columns belong to this task, which holds no other part of them now.
                        add_weighted(weight, values, unsafe { out.part(slot, outputs.cols.clone()) });
                    }
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

/// The rows of each expert among `rows [_, width]`.
fn split<'a>(rows: &'a mut [f32], experts: &[Inputs<'_>], width: usize) -> impl Iterator<Item = &'a mut [f32]> {
    let mut rest = rows;
    experts.iter().map(move |expert| rest.split_off_mut(..expert.rows * width).unwrap_or_default())
}
