//! Multi-head latent attention on the CPU device.

#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Cpu,
    inputs::Inputs,
    kernels::Columns,
    products::{self, Product},
};
use crate::{
    Device, Dtype, LatentWrite, MlaShape, RotaryTable, SequenceRows,
    cache::LatentCache,
    grid::Grid,
    ops::{attention::merge_splits, latents::LATENT_EPS, rope::rope},
    panels::{Element, Panels},
    scratch::Scratch,
    tasks,
};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;
/// Rows of the cache and of queries are padded by zeros to a multiple of this.
const ALIGN: usize = 8;
/// Heads that one task takes through a split.
const HEADS: usize = 8;
/// Reduced splits held at a time, in elements; more where a single row needs them.
const PARTIALS: usize = 4 << 20;

/// Elements from one row of the cache to the next.
pub(super) fn stride(shape: &MlaShape) -> usize {
    shape.cached().next_multiple_of(ALIGN)
}

/// One row of the batch within attention.
struct Row<'a> {
    /// Row of the batch.
    index: usize,
    /// Positions it sees: all up to its own.
    keys: usize,
    blocks: &'a [u32],
    /// Where its splits begin among the partial results.
    partials: usize,
}

/// One split of one row for some heads.
struct Part {
    row: usize,
    split: usize,
    heads: Range<usize>,
}

impl Cpu {
    pub(super) fn queries(
        &self,
        shape: &MlaShape,
        (q, uk): (&[f32], &[Panels<u16>]),
        (rotary, positions): (&RotaryTable, &[u32]),
        out: &mut [f32],
    ) {
        let (width, cached, heads) = (shape.nope + shape.rope, shape.cached(), shape.heads);
        let rows = positions.len();
        assert_eq!((q.len(), uk.len()), (rows * heads * width, heads), "queries");
        assert_eq!(out.len(), rows * heads * cached, "absorbed queries");
        let of_head = |head: usize| {
            let data = q.get(head * width..).unwrap_or_default();
            Inputs { data, stride: heads * width, width: shape.nope, rows, picked: None }
        };
        self.by_heads(of_head, uk, Grid::new(out, heads * cached), cached);
        self.rows(out, cached, 4 * shape.rope, |index, out| {
            let (cos, sin) = rotary.at(positions[index / heads], shape.rope / 2);
            let out = &mut out[shape.latent..];
            out.copy_from_slice(&q[index * width + shape.nope..][..shape.rope]);
            rope(out, cos, sin);
        });
    }

    pub(super) fn latents(&self, cache: &mut LatentCache<u16>, layer: usize, write: &LatentWrite<'_>) {
        let MlaShape { latent, rope: roped, .. } = *cache.shape();
        let width = latent + roped;
        assert_eq!(write.kv.len(), write.slots.len() * width, "rows of latents");
        let mut row = Scratch::take(width);
        for (index, (kv, slot)) in write.kv.chunks_exact(width).zip(write.slots).enumerate() {
            self.kernels.rms_norm(&kv[..latent], write.gain, LATENT_EPS, &mut row[..latent]);
            row[latent..].copy_from_slice(&kv[latent..]);
            let (cos, sin) = write.rotary.at(write.positions[index], roped / 2);
            rope(&mut row[latent..], cos, sin);
            cache.row_mut(layer, *slot).iter_mut().zip(&*row).for_each(|(to, value)| *to = u16::narrow(*value));
        }
    }

    pub(super) fn attention(
        &self,
        (cache, layer): (&LatentCache<u16>, usize),
        q: &[f32],
        sequences: &[SequenceRows<'_>],
        scale: f32,
        out: &mut [f32],
    ) {
        let MlaShape { heads, latent, .. } = *cache.shape();
        let of_split = heads * (latent + 2);
        let mut all = sequences.iter().flat_map(rows_of).peekable();
        while all.peek().is_some() {
            let mut length = 0;
            let mut rows: Vec<Row<'_>> = Vec::new();
            while let Some(row) = all.next_if(|_| length == 0 || length < PARTIALS) {
                let splits = row.keys.div_ceil(SPLIT);
                rows.push(Row { partials: length, ..row });
                length += splits * of_split;
            }
            let mut partials = Scratch::take(length);
            self.reduce(&rows, (cache, layer), q, scale, &mut partials);
            self.merge(&rows, heads, latent, &partials, out);
        }
    }

    /// Reduces each split of each row into `partials [splits, heads, r + 2]`, where the row says.
    fn reduce(
        &self,
        rows: &[Row<'_>],
        (cache, layer): (&LatentCache<u16>, usize),
        q: &[f32],
        scale: f32,
        partials: &mut [f32],
    ) {
        let MlaShape { heads, latent, .. } = *cache.shape();
        let width = cache.shape().cached();
        let parts: Vec<Part> = rows.iter().enumerate().flat_map(|(row, of)| parts_of(row, of.keys, heads)).collect();
        let grid = Grid::new(partials, latent + 2);
        let keys: usize = rows.iter().map(|row| row.keys).sum();
        let at_once = tasks::at_once(&self.pool, parts.len(), (keys * heads * 2 * width).div_ceil(parts.len()));
        self.pool.run(parts.len().div_ceil(at_once), |task| {
            for part in parts.iter().skip(task * at_once).take(at_once) {
                let row = &rows[part.row];
                let q = &q[(row.index * heads + part.heads.start) * width..][..part.heads.len() * width];
                let keys = part.split * SPLIT..row.keys.min((part.split + 1) * SPLIT);
                let keys = keys
                    .clone()
                    .step_by(BLOCK)
                    .map(|at| cache.block(layer, row.blocks[at / BLOCK], BLOCK.min(keys.end - at)));
                let first = row.partials / (latent + 2) + part.split * heads + part.heads.start;
                self.reduce_split(cache.shape(), q, keys, scale, |head, values| {
                    // SAFETY: each part has splits and heads of its own.
                    let out = unsafe { grid.part(first + head, 0..latent + 2) };
                    out[..2].copy_from_slice(&values.0);
                    out[2..].copy_from_slice(values.1);
                });
            }
        });
    }

    /// Reduces one split for the heads of `q [heads, r + dr]`: `sink(head, ([max, sum], latents))`.
    fn reduce_split<'k>(
        &self,
        shape: &MlaShape,
        q: &[f32],
        keys: impl Iterator<Item = &'k [u16]> + Clone,
        scale: f32,
        mut sink: impl FnMut(usize, ([f32; 2], &[f32])),
    ) {
        let (width, stride) = (shape.cached(), stride(shape));
        let heads = q.len() / width;
        let mut padded = Scratch::take(heads * stride);
        for (padded, q) in padded.chunks_exact_mut(stride).zip(q.chunks_exact(width)) {
            self.kernels.round(q, &mut padded[..width]);
            padded[width..].fill(0.0);
        }
        let mut scores = Scratch::take(heads * SPLIT);
        let mut at = 0;
        for keys in keys.clone() {
            self.kernels.scores(&padded, keys, stride, Columns { values: &mut scores, width: SPLIT, at });
            at += keys.len() / stride;
        }
        let mut statistics = [[0.0; 2]; HEADS];
        for (statistics, scores) in statistics.iter_mut().zip(scores.chunks_exact_mut(SPLIT)) {
            *statistics = self.kernels.softmax(scale, &mut scores[..at]).into();
        }
        let length = shape.latent.next_multiple_of(ALIGN);
        let mut sums = Scratch::take(heads * length);
        sums.fill(0.0);
        at = 0;
        for keys in keys {
            self.kernels.weigh(Columns { values: &mut scores, width: SPLIT, at }, keys, stride, &mut sums);
            at += keys.len() / stride;
        }
        for (head, (statistics, sums)) in statistics.iter().zip(sums.chunks_exact(length)).enumerate() {
            sink(head, (*statistics, &sums[..shape.latent]));
        }
    }

    /// Merges the splits of each row and head in ascending order.
    fn merge(&self, rows: &[Row<'_>], heads: usize, latent: usize, partials: &[f32], out: &mut [f32]) {
        let of_split = heads * (latent + 2);
        let out = Grid::new(out, latent);
        let splits: usize = rows.iter().map(|row| row.keys.div_ceil(SPLIT)).sum();
        let at_once = tasks::at_once(&self.pool, rows.len(), (splits * of_split).div_ceil(rows.len().max(1)));
        self.pool.run(rows.len().div_ceil(at_once), |task| {
            for row in rows.iter().skip(task * at_once).take(at_once) {
                let partials = &partials[row.partials..][..row.keys.div_ceil(SPLIT) * of_split];
                for head in 0..heads {
                    let splits = partials.chunks_exact(latent + 2).skip(head).step_by(heads);
                    // SAFETY: each row belongs to one task.
                    merge_splits(splits, unsafe { out.part(row.index * heads + head, 0..latent) });
                }
            }
        });
    }

    pub(super) fn values(&self, shape: &MlaShape, o_lat: &[f32], uv: &[Panels<u16>], out: &mut [f32]) {
        let MlaShape { heads, value, latent, .. } = *shape;
        let rows = o_lat.len() / (heads * latent).max(1);
        assert_eq!((o_lat.len(), uv.len()), (rows * heads * latent, heads), "weighted latents");
        assert_eq!(out.len(), rows * heads * value, "values");
        let of_head = |head: usize| {
            let data = o_lat.get(head * latent..).unwrap_or_default();
            Inputs { data, stride: heads * latent, width: latent, rows, picked: None }
        };
        self.by_heads(of_head, uv, Grid::new(out, heads * value), value);
    }

    /// The product of each head's inputs with its matrix, into columns from `head · width` on.
    fn by_heads<'a>(&self, inputs: impl Fn(usize) -> Inputs<'a>, w: &[Panels<u16>], out: Grid<'_, f32>, width: usize) {
        let inputs: Vec<Inputs<'_>> = (0..w.len()).map(inputs).collect();
        let x = self.packed(Dtype::Bf16, &inputs);
        let products: Vec<Product<'_, 1>> =
            w.iter().enumerate().map(|(head, w)| Product { x: x.of(head), w: [w] }).collect();
        products::run(&self.pool, &products, |head, outputs| {
            let cols = head * width + outputs.cols.start..head * width + outputs.cols.end;
            for (row, [values]) in outputs.rows() {
                // SAFETY: each output is handed over once.
                let out = unsafe { out.part(row, cols.clone()) };
                out.copy_from_slice(&values[..out.len()]);
            }
        });
    }
}

fn rows_of<'a>(sequence: &SequenceRows<'a>) -> impl Iterator<Item = Row<'a>> {
    let SequenceRows { first_row, rows, first_position, blocks } = *sequence;
    (0..rows).map(move |row| Row { index: first_row + row, keys: first_position + row + 1, blocks, partials: 0 })
}

fn parts_of(row: usize, keys: usize, heads: usize) -> impl Iterator<Item = Part> {
    (0..keys.div_ceil(SPLIT)).flat_map(move |split| {
        (0..heads).step_by(HEADS).map(move |first| Part { row, split, heads: first..heads.min(first + HEADS) })
    })
}
