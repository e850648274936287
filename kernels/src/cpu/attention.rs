//! Absorbed attention over the latent cache.
//!
//! A task takes a few rows of one sequence, and some heads of each, through one split: the keys of a split are read once for
//! all of them.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{Cpu, kernels::Columns};
use crate::{
    Device, MlaShape, RowSpan, cache::LatentCache, grid::Grid, ops::attention::merge_splits, scratch::Scratch, tasks,
};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;
/// Rows of the cache and of queries are padded by zeros to a multiple of this: the lanes of the widest vector.
const ALIGN: usize = 16;
/// Rows of a sequence that one task takes through a split.
const ROWS: usize = 4;
/// Heads that one task takes through a split.
const HEADS: usize = 8;
/// Reduced splits held at a time, in elements; more where a single group of rows needs them.
const PARTIALS: usize = 4 << 20;

/// Elements from one row of the cache to the next.
pub(super) fn stride(shape: &MlaShape) -> usize {
    shape.cached().next_multiple_of(ALIGN)
}

/// Rows of one sequence, one behind the other.
struct Group<'a> {
    /// The first of them in the batch.
    first: usize,
    count: usize,
    /// Position of the first.
    position: usize,
    blocks: &'a [u32],
    /// Where their splits begin among the partial results, `[rows, splits, heads, r + 2]`.
    partials: usize,
}

impl Group<'_> {
    /// Positions that a row sees: all up to its own.
    fn keys(&self, row: usize) -> usize {
        self.position + row + 1
    }

    /// Splits of the last row; another may have fewer.
    fn splits(&self) -> usize {
        self.keys(self.count - 1).div_ceil(SPLIT)
    }

    /// Rows that see something of a split.
    fn rows(&self, split: usize) -> Range<usize> {
        (split * SPLIT).saturating_sub(self.position).min(self.count)..self.count
    }
}

/// One split of a group of rows for some heads.
struct Part {
    group: usize,
    split: usize,
    heads: Range<usize>,
}

/// What a task reduces: queries `[rows, heads, stride]`, rounded and padded, and the keys that each row sees.
struct Queries<'a> {
    values: &'a [f32],
    heads: usize,
    /// Keys of the split that each row sees; ascending.
    seen: &'a [usize],
}

impl Cpu {
    pub(super) fn attention(
        &self,
        cache: (&LatentCache<u16>, usize),
        q: &[f32],
        spans: &[RowSpan],
        scale: f32,
        out: &mut [f32],
    ) {
        let MlaShape { heads, latent, .. } = *cache.0.shape();
        let mut all = spans.iter().flat_map(groups_of).peekable();
        while all.peek().is_some() {
            let mut length = 0;
            let mut groups: Vec<Group<'_>> = Vec::new();
            while let Some(group) = all.next_if(|_| length == 0 || length < PARTIALS) {
                let partials = length;
                length += group.count * group.splits() * heads * (latent + 2);
                groups.push(Group { partials, ..group });
            }
            let mut partials = Scratch::take(length);
            self.reduce(&groups, cache, q, scale, &mut partials);
            self.merge(&groups, heads, latent, &partials, out);
        }
    }

    /// Reduces each split of each row into its place among the partial results.
    fn reduce(
        &self,
        groups: &[Group<'_>],
        (cache, layer): (&LatentCache<u16>, usize),
        q: &[f32],
        scale: f32,
        partials: &mut [f32],
    ) {
        let shape = cache.shape();
        let (heads, of_head) = (shape.heads, shape.latent + 2);
        let parts: Vec<Part> = groups.iter().enumerate().flat_map(|(at, group)| parts_of(at, group, heads)).collect();
        let grid = Grid::new(partials, of_head);
        let keys: usize = groups.iter().map(|group| group.count * group.keys(group.count - 1)).sum();
        let at_once =
            tasks::at_once(&self.pool, parts.len(), (keys * heads * 2 * shape.cached()).div_ceil(parts.len()));
        self.pool.run(parts.len().div_ceil(at_once), |task| {
            for part in parts.iter().skip(task * at_once).take(at_once) {
                let group = &groups[part.group];
                let rows = group.rows(part.split);
                let keys = |row: usize| SPLIT.min(group.keys(row) - part.split * SPLIT);
                let seen: [usize; ROWS] = std::array::from_fn(|at| keys(rows.end.min(rows.start + at + 1) - 1));
                let values = self.padded(shape, q, group.first + rows.start..group.first + rows.end, &part.heads);
                let queries = Queries { values: &values, heads: part.heads.len(), seen: &seen[..rows.len()] };
                let block = |at: usize, rows| cache.block(layer, group.blocks[part.split * SPLIT / BLOCK + at], rows);
                self.reduce_split(shape, &queries, block, scale, |row, head, values| {
                    let row = group.partials / of_head + (rows.start + row) * group.splits() * heads;
                    let head = part.split * heads + part.heads.start + head;
                    // SAFETY: each part has rows, splits and heads of its own.
                    let out = unsafe { grid.part(row + head, 0..of_head) };
                    out[..2].copy_from_slice(&values.0);
                    out[2..].copy_from_slice(values.1);
                });
            }
        });
    }

    /// The queries of some rows and heads, rounded, with zeros up to the stride of keys: `[rows, heads, stride]`.
    fn padded(&self, shape: &MlaShape, q: &[f32], rows: Range<usize>, heads: &Range<usize>) -> Scratch {
        let (width, stride) = (shape.cached(), stride(shape));
        let mut padded = Scratch::take(rows.len() * heads.len() * stride);
        let sources = rows.flat_map(|row| heads.clone().map(move |head| row * shape.heads + head));
        for (padded, source) in padded.chunks_exact_mut(stride).zip(sources) {
            self.kernels.round(&q[source * width..][..width], &mut padded[..width]);
            padded[width..].fill(0.0);
        }
        padded
    }

    /// Reduces one split, `block(i, rows)` being the first rows of its block `i`: `sink(row, head, ([max, sum], latents))`.
    fn reduce_split<'k>(
        &self,
        shape: &MlaShape,
        queries: &Queries<'_>,
        block: impl Fn(usize, usize) -> &'k [u16],
        scale: f32,
        mut sink: impl FnMut(usize, usize, ([f32; 2], &[f32])),
    ) {
        let Queries { values, heads, seen } = *queries;
        let (stride, count) = (stride(shape), seen.len() * heads);
        // Keys of a range, block by block, and where they begin in the split; the first block may be cut at its front.
        let block = &block;
        let keys = |range: Range<usize>| {
            (range.start / BLOCK..range.end.div_ceil(BLOCK)).map(move |at| {
                let (from, to) = (range.start.max(at * BLOCK), range.end.min((at + 1) * BLOCK));
                (from, &block(at, to - at * BLOCK)[(from - at * BLOCK) * stride..])
            })
        };
        let mut scores = Scratch::take(count * SPLIT);
        for (at, keys) in keys(0..seen[seen.len() - 1]) {
            self.kernels.scores(values, keys, stride, Columns { values: &mut scores, width: SPLIT, at });
        }
        let mut statistics = [[0.0; 2]; ROWS * HEADS];
        for (index, scores) in scores.chunks_exact_mut(SPLIT).enumerate() {
            statistics[index] = self.kernels.softmax(scale, &mut scores[..seen[index / heads]]).into();
        }
        let length = shape.latent.next_multiple_of(ALIGN);
        let mut sums = Scratch::take(count * length);
        sums.fill(0.0);
        for (at, keys) in keys(0..seen[0]) {
            self.kernels.weigh(Columns { values: &mut scores, width: SPLIT, at }, keys, stride, &mut sums);
        }
        // A row sees a few keys more than the first one.
        let rows = scores.chunks_exact_mut(heads * SPLIT).zip(sums.chunks_exact_mut(heads * length)).zip(seen);
        for ((scores, sums), seen_by_row) in rows {
            for (at, keys) in keys(seen[0]..*seen_by_row) {
                self.kernels.weigh(Columns { values: scores, width: SPLIT, at }, keys, stride, sums);
            }
        }
        for (index, (statistics, sums)) in statistics.iter().zip(sums.chunks_exact(length)).enumerate() {
            sink(index / heads, index % heads, (*statistics, &sums[..shape.latent]));
        }
    }

    /// Merges the splits of each row and head in ascending order.
    fn merge(&self, groups: &[Group<'_>], heads: usize, latent: usize, partials: &[f32], out: &mut [f32]) {
        let of_split = heads * (latent + 2);
        let out = Grid::new(out, latent);
        let splits: usize = groups.iter().map(|group| group.count * group.splits()).sum();
        let at_once = tasks::at_once(&self.pool, groups.len(), (splits * of_split).div_ceil(groups.len().max(1)));
        self.pool.run(groups.len().div_ceil(at_once), |task| {
            for group in groups.iter().skip(task * at_once).take(at_once) {
                for row in 0..group.count {
                    let partials = &partials[group.partials + row * group.splits() * of_split..];
                    let partials = &partials[..group.keys(row).div_ceil(SPLIT) * of_split];
                    for head in 0..heads {
                        let splits = partials.chunks_exact(latent + 2).skip(head).step_by(heads);
                        // SAFETY: each group belongs to one task.
                        merge_splits(splits, unsafe { out.part((group.first + row) * heads + head, 0..latent) });
                    }
                }
            }
        });
    }
}

fn groups_of(span: &RowSpan) -> impl Iterator<Item = Group<'_>> {
    let &RowSpan { first_row, rows, first_position, ref blocks } = span;
    (0..rows).step_by(ROWS).map(move |row| Group {
        first: first_row + row,
        count: ROWS.min(rows - row),
        position: first_position + row,
        blocks,
        partials: 0,
    })
}

fn parts_of(index: usize, group: &Group<'_>, heads: usize) -> impl Iterator<Item = Part> + use<> {
    (0..group.splits()).flat_map(move |split| {
        (0..heads).step_by(HEADS).map(move |first| Part { group: index, split, heads: first..heads.min(first + HEADS) })
    })
}
