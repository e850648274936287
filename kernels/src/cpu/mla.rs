//! What stands around attention over latents: absorbed queries, the rows of the cache, and values.
#![allow(unsafe_code)]

use super::{
    Cpu, CpuMatrix,
    inputs::Inputs,
    products::{self, Product},
};
use crate::{
    Dtype, LatentWrite, Mla, MlaShape, RotaryTable, StepRows,
    cache::LatentCache,
    grid::Grid,
    ops::{latents::LATENT_EPS, rope::rope},
    panels::Element,
    scratch::Scratch,
};

impl Cpu {
    pub(super) fn queries(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        q: &[f32],
        uk: &[CpuMatrix],
        out: &mut [f32],
    ) {
        let shape = &mla.shape;
        let (width, cached, heads) = (shape.nope + shape.rope, shape.cached(), shape.heads);
        assert_eq!((q.len(), uk.len()), (batch.len() * heads * width, heads), "queries");
        assert_eq!(out.len(), batch.len() * heads * cached, "absorbed queries");
        let absorbed = batch.absorbed();
        let of_head = |head: usize| {
            let data = q.get(head * width..).unwrap_or_default();
            of_rows(data, (heads * width, shape.nope), batch, absorbed.as_deref())
        };
        self.by_heads(of_head, uk, Grid::new(out, heads * cached), cached);
        self.rows(out, cached, 4 * shape.rope, |index, out| {
            let (cos, sin) = mla.rotary.at(batch.positions[index / heads], shape.rope / 2);
            let out = &mut out[shape.latent..];
            out.copy_from_slice(&q[index * width + shape.nope..][..shape.rope]);
            rope(out, cos, sin);
        });
    }

    pub(super) fn latents(
        &self,
        mla: &Mla<RotaryTable>,
        batch: &StepRows,
        write: &LatentWrite<'_, Vec<f32>>,
        cache: &mut LatentCache<u16>,
    ) {
        let MlaShape { latent, rope: roped, .. } = mla.shape;
        let width = latent + roped;
        assert_eq!(write.kv.len(), batch.len() * width, "rows of latents");
        let mut row = Scratch::take(width);
        for ((kv, slot), position) in write.kv.chunks_exact(width).zip(&batch.slots).zip(&batch.positions) {
            self.kernels.rms_norm(&kv[..latent], write.gain, LATENT_EPS, &mut row[..latent]);
            row[latent..].copy_from_slice(&kv[latent..]);
            let (cos, sin) = mla.rotary.at(*position, roped / 2);
            rope(&mut row[latent..], cos, sin);
            cache.row_mut(write.layer, *slot).iter_mut().zip(&*row).for_each(|(to, value)| *to = u16::narrow(*value));
        }
    }

    pub(super) fn values(&self, shape: &MlaShape, batch: &StepRows, o_lat: &[f32], uv: &[CpuMatrix], out: &mut [f32]) {
        let MlaShape { heads, value, latent, .. } = *shape;
        let (rows, absorbed) = (batch.len(), batch.absorbed());
        assert_eq!((o_lat.len(), uv.len()), (rows * heads * latent, heads), "weighted latents");
        assert_eq!(out.len(), rows * heads * value, "values");
        let of_head = |head: usize| {
            let data = o_lat.get(head * latent..).unwrap_or_default();
            of_rows(data, (heads * latent, latent), batch, absorbed.as_deref())
        };
        self.by_heads(of_head, uv, Grid::new(out, heads * value), value);
    }

    /// The product of each head's inputs with its matrix, into columns from `head · width` on.
    fn by_heads<'a>(&self, inputs: impl Fn(usize) -> Inputs<'a>, w: &[CpuMatrix], out: Grid<'_, f32>, width: usize) {
        let inputs: Vec<Inputs<'_>> = (0..w.len()).map(inputs).collect();
        let picked = inputs.first().and_then(|inputs| inputs.picked);
        let x = self.packed(Dtype::Bf16, w, &inputs);
        let products: Vec<Product<'_, 1>> =
            w.iter().enumerate().map(|(head, w)| Product { x: x.of(head), w: [w] }).collect();
        products::run(&self.pool, &products, |head, outputs| {
            let cols = head * width + outputs.cols.start..head * width + outputs.cols.end;
            for (row, [values]) in outputs.rows() {
                // SAFETY: each output is handed over once.
                let out = unsafe { out.part(picked.map_or(row, |picked| picked[row] as usize), cols.clone()) };
                products::put(values, out);
            }
        });
    }
}

/// All rows of a batch, or those that are picked.
fn of_rows<'a>(
    data: &'a [f32],
    (stride, width): (usize, usize),
    batch: &StepRows,
    picked: Option<&'a [u32]>,
) -> Inputs<'a> {
    Inputs { data, stride, width, rows: picked.map_or(batch.len(), <[u32]>::len), picked }
}
