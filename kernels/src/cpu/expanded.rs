//! Attention over keys and values that are expanded from the latents (MODEL §3.2). For many rows of a sequence this takes
//! fewer operations than absorbing their queries, and gives other bits: it is for services that are asked not to be exact.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Cpu, CpuMatrix,
    inputs::Inputs,
    split::{BlockRows, Split},
};
use crate::{
    Device, Dtype, Mla, MlaShape, RotaryTable, RowSpan,
    cache::LatentCache,
    grid::Grid,
    ops::{attention::merge_split, rope::rope},
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
    shape.value.next_multiple_of(WIDTH)
}

impl Expanded<'_> {
    /// The rows of `span` of `out [T, n · dv]`. `q [T, n, dn + dr]`, as projected.
    pub(super) fn attend(&self, span: &RowSpan, q: &[f32], out: &mut [f32]) {
        let MlaShape { heads, value, .. } = self.mla.shape;
        let queries = self.roped(span, q);
        // `[rows, n, 2 + dv]`: largest score, sum of weights, values summed by weight.
        let mut sums = Scratch::take(span.rows * heads * (2 + value));
        sums.fill(0.0);
        sums.chunks_exact_mut(2 + value).for_each(|sums| sums[0] = f32::NEG_INFINITY);
        let keys = span.first_position + span.rows;
        for first in (0..keys).step_by(SPLIT) {
            let of_split = self.expand(span, first..keys.min(first + SPLIT));
            self.add(span, first, &of_split, &queries, &mut sums);
        }
        let out = &mut out[span.first_row * heads * value..][..span.rows * heads * value];
        for (out, sums) in out.chunks_exact_mut(value).zip(sums.chunks_exact(2 + value)) {
            out.iter_mut().zip(&sums[2..]).for_each(|(out, value)| *out = value / sums[1]);
        }
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

    /// Adds the split that begins at position `first` to the sums of the rows that see something of it.
    fn add(&self, span: &RowSpan, first: usize, of_split: &Heads, queries: &[f32], sums: &mut [f32]) {
        let MlaShape { heads, nope, rope: roped, value, .. } = self.mla.shape;
        let seeing = first.saturating_sub(span.first_position).min(span.rows)..span.rows;
        let groups: Vec<Range<usize>> =
            seeing.clone().step_by(ROWS).map(|row| row..seeing.end.min(row + ROWS)).collect();
        let sums = Grid::new(sums, 2 + value);
        self.cpu.pool.run(groups.len() * heads, |task| {
            let (rows, head) = (&groups[task / heads], task % heads);
            let seen = |row: usize| of_split.count.min(span.first_position + row + 1 - first);
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
            let on = (&*self.cpu.pool, self.cpu.kernels);
            split.reduce(
                on,
                queries,
                |index| seen(rows.start + index),
                |index, statistics, values| {
                    // SAFETY: each row and head belongs to one task.
                    let sums = unsafe { sums.part((rows.start + index) * heads + head, 0..2 + value) };
                    let (so_far, sums) = sums.split_first_chunk_mut().expect("two statistics");
                    merge_split(so_far, sums, statistics, values);
                },
            );
        });
    }
}

fn widen(from: &[u16], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, value)| *to = value.widen());
}

fn narrow(from: &[f32], to: &mut [u16]) {
    to.iter_mut().zip(from).for_each(|(to, value)| *to = u16::narrow(*value));
}
