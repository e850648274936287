//! Attention over keys and values that are expanded from the latents (MODEL §3.2). For many rows of a sequence this takes
//! fewer operations than absorbing their queries, and gives other bits: it is for services that are asked not to be exact.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Cpu, CpuMatrix,
    inputs::Inputs,
    sink::Merged,
    split::{BlockRows, Queries, Split},
};
use crate::{
    Device, Dtype, Mla, MlaShape, RotaryTable, RowSpan,
    cache::LatentCache,
    grid::Grid,
    ops::rope::rope,
    panels::{Element, STEPS, WIDTH},
    scratch::Scratch,
};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;
/// Rows of a span that one task takes through a split for one head.
const ROWS: usize = 64;

/// What a layer's attention needs.
pub(super) struct Expanded<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) mla: &'a Mla<RotaryTable>,
    /// The cache, and which layer of it.
    pub(super) cache: (&'a LatentCache<u16>, usize),
    /// `[n · (dn + dv), r]`
    pub(super) kv_b: &'a CpuMatrix,
}

/// Some rows of a span, for one head.
struct Part<'o> {
    rows: Range<usize>,
    merged: Merged<'o>,
}

/// Keys and values of a split, head by head: `[n][rows][stride]` each, rows being whole panels.
struct Heads {
    keys: Scratch,
    values: Scratch,
    count: usize,
    shape: MlaShape,
}

impl Heads {
    fn new(shape: MlaShape, count: usize) -> Self {
        let take = |stride: usize| Scratch::take(shape.heads * count.next_multiple_of(WIDTH) * stride / 2);
        Self { keys: take(key_stride(&shape)), values: take(value_stride(&shape)), count, shape }
    }

    /// Those of one head in blocks.
    fn blocks<'a>(&self, memory: &'a [f32], head: usize, stride: usize) -> Vec<&'a [u16]> {
        let length = self.count.next_multiple_of(WIDTH) * stride;
        bytemuck::cast_slice(memory)[head * length..][..length].chunks(BLOCK * stride).collect()
    }
}

fn key_stride(shape: &MlaShape) -> usize {
    (shape.nope + shape.rope).next_multiple_of(STEPS)
}

fn value_stride(shape: &MlaShape) -> usize {
    shape.value.next_multiple_of(STEPS)
}

impl Expanded<'_> {
    /// The rows of `span` of `out [T, n · dv]`. `q [T, n, dn + dr]`, as projected.
    pub(super) fn attend(&self, span: &RowSpan, q: &[f32], out: &mut [f32]) {
        let MlaShape { heads, value, .. } = self.mla.shape;
        let queries = self.roped(span, q);
        let mut parts = self.parts(span, &mut out[span.first_row * heads * value..][..span.rows * heads * value]);
        let keys = span.first_position + span.rows;
        for first in (0..keys).step_by(SPLIT) {
            let of_split = self.expand(span, first..keys.min(first + SPLIT));
            self.add(span, first, &of_split, &queries, &mut parts);
        }
        parts.into_iter().for_each(|part| part.merged.finish());
    }

    /// Some rows of a span for one head each. `out [rows of the span, n · dv]`
    fn parts<'o>(&self, span: &RowSpan, out: &'o mut [f32]) -> Vec<Part<'o>> {
        let MlaShape { heads, value, .. } = self.mla.shape;
        let groups = (0..span.rows).step_by(ROWS).map(|row| row..span.rows.min(row + ROWS));
        let mut parts: Vec<(Range<usize>, Vec<&mut [f32]>)> =
            groups.flat_map(|rows| (0..heads).map(move |_| (rows.clone(), Vec::new()))).collect();
        for (index, out) in out.chunks_exact_mut(value).enumerate() {
            parts[index / heads / ROWS * heads + index % heads].1.push(out);
        }
        let part = |(rows, out): (_, Vec<_>)| Part { rows, merged: Merged::new(out.into_iter()) };
        parts.into_iter().map(part).collect()
    }

    /// The span's queries `[rows, n, dn + dr]`, their last part rotated.
    fn roped(&self, span: &RowSpan, q: &[f32]) -> Scratch {
        let MlaShape { heads, nope, rope: roped, .. } = self.mla.shape;
        let width = nope + roped;
        let mut queries = Scratch::take(span.rows * heads * width);
        queries.copy_from_slice(&q[span.first_row * heads * width..][..span.rows * heads * width]);
        self.cpu.rows(&mut queries, width, 4 * roped, |index, query| {
            let (cos, sin) = self.mla.rotary.at((span.first_position + index / heads) as u32, roped / 2);
            rope(&mut query[nope..], cos, sin);
        });
        queries
    }

    /// Keys and values of some positions, of a split at most.
    fn expand(&self, span: &RowSpan, positions: Range<usize>) -> Heads {
        let MlaShape { heads, nope, rope: roped, value, latent } = self.mla.shape;
        let ((cache, layer), stride) = (self.cache, self.cache.0.stride());
        let rows = positions.clone().step_by(BLOCK).flat_map(|at| {
            let rows = cache.block(layer, span.blocks[at / BLOCK], BLOCK.min(positions.end - at));
            rows.chunks_exact(stride)
        });
        let rows: Vec<&[u16]> = rows.collect();
        let mut latents = Scratch::take(rows.len() * latent);
        self.cpu.rows(&mut latents, latent, latent, |row, to| widen(&rows[row][..latent], to));
        let mut expanded = Scratch::take(rows.len() * heads * (nope + value));
        self.cpu.product(Inputs::new(&latents, latent), Dtype::Bf16, self.kv_b, &mut expanded);

        let mut found = Heads::new(self.mla.shape, rows.len());
        let (key_stride, value_stride) = (key_stride(&found.shape), value_stride(&found.shape));
        let length = rows.len().next_multiple_of(WIDTH);
        let keys = Grid::new(bytemuck::cast_slice_mut(&mut found.keys), length * key_stride);
        let values = Grid::new(bytemuck::cast_slice_mut(&mut found.values), length * value_stride);
        self.cpu.pool.run(heads, |head| {
            // SAFETY: each head belongs to one task.
            let (keys, values): (&mut [u16], &mut [u16]) =
                unsafe { (keys.part(head, 0..length * key_stride), values.part(head, 0..length * value_stride)) };
            let to = keys.chunks_exact_mut(key_stride).zip(values.chunks_exact_mut(value_stride));
            let from = expanded.chunks_exact(heads * (nope + value)).zip(&rows);
            for ((key, values), (expanded, cached)) in to.zip(from) {
                let (from_key, from_value) = expanded[head * (nope + value)..][..nope + value].split_at(nope);
                narrow(from_key, key);
                key[nope..nope + roped].copy_from_slice(&cached[latent..latent + roped]);
                key[nope + roped..].fill(0);
                narrow(from_value, values);
                values[value..].fill(0);
            }
        });
        found
    }

    /// Merges the split that begins at position `first` into the rows that see something of it.
    fn add(&self, span: &RowSpan, first: usize, of_split: &Heads, queries: &[f32], parts: &mut [Part<'_>]) {
        let MlaShape { heads, nope, rope: roped, value, .. } = self.mla.shape;
        let seen = |row: usize| (span.first_position + row + 1).saturating_sub(first).min(of_split.count);
        let seeing = parts.partition_point(|part| seen(part.rows.end - 1) == 0);
        self.cpu.pool.run_chunks(&mut parts[seeing..], 1, |task, part| {
            let (Part { rows, merged }, head) = (&mut part[0], task % heads);
            let (key_stride, value_stride) = (key_stride(&of_split.shape), value_stride(&of_split.shape));
            let keys = of_split.blocks(&of_split.keys, head, key_stride);
            let values = of_split.blocks(&of_split.values, head, value_stride);
            let split = Split {
                keys: BlockRows { blocks: &keys, stride: key_stride },
                values: BlockRows { blocks: &values, stride: value_stride },
                width: value,
                count: seen(rows.end - 1),
                scale: self.mla.scale,
            };
            let picked: Vec<u32> = rows.clone().map(|row| (row * heads + head) as u32).collect();
            let queries = Inputs { rows: picked.len(), picked: Some(&picked), ..Inputs::new(queries, nope + roped) };
            let queries = Queries::new(&self.cpu.pool, self.cpu.kernels, queries);
            let on = (&*self.cpu.pool, self.cpu.kernels);
            split.reduce(on, &queries, |index| seen(rows.start + index), merged);
        });
    }
}

fn widen(from: &[u16], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, value)| *to = value.widen());
}

fn narrow(from: &[f32], to: &mut [u16]) {
    to.iter_mut().zip(from).for_each(|(to, value)| *to = u16::narrow(*value));
}
