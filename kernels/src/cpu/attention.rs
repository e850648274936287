//! Absorbed attention over the latent cache.
//!
//! A task takes a few rows of one sequence, and some heads of each, through one split: the keys of a split are read once for
//! all of them.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Cpu,
    inputs::Inputs,
    split::{BlockRows, Split},
};
use crate::{
    Device, MlaShape, RowSpan,
    cache::LatentCache,
    grid::Grid,
    ops::attention::merge_splits,
    panels::{STEPS, WIDTH},
    scratch::Scratch,
    tasks,
};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;
/// Queries (one for each row and head) that one task takes through a split: enough that packing its keys costs little, and so
/// few that their scores and sums stay in the second cache.
const QUERIES: usize = 64;
/// Heads that one task takes at least, if there are fewer tasks than threads.
const HEADS: usize = 8;
/// Reduced splits held at a time, in elements; more where a single group of rows needs them.
const PARTIALS: usize = 4 << 20;

/// Elements from one row of the cache to the next: whole panels, padded by zeros.
pub(super) fn stride(shape: &MlaShape) -> usize {
    shape.cached().next_multiple_of(STEPS)
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
        let absorbed = spans.iter().filter(|span| !span.expanded);
        let mut all = absorbed.flat_map(|span| groups_of(span, heads)).peekable();
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
        let parts = parts_of(groups, heads, self.pool.threads());
        let grid = Grid::new(partials, of_head);
        let keys: usize = groups.iter().map(|group| group.count * group.keys(group.count - 1)).sum();
        let at_once =
            tasks::at_once(&self.pool, parts.len(), (keys * heads * 2 * shape.cached()).div_ceil(parts.len()));
        self.pool.run(parts.len().div_ceil(at_once), |task| {
            for part in parts.iter().skip(task * at_once).take(at_once) {
                let group = &groups[part.group];
                self.reduce_part(group, part, (cache, layer), (q, scale), |row, head, statistics, latents| {
                    let row = group.partials / of_head + row * group.splits() * heads;
                    // SAFETY: each part has rows, splits and heads of its own.
                    let out = unsafe { grid.part(row + part.split * heads + head, 0..of_head) };
                    out[..2].copy_from_slice(&statistics);
                    out[2..].copy_from_slice(latents);
                });
            }
        });
    }

    /// `sink(row of the group, head, [max, sum], latents)`
    fn reduce_part(
        &self,
        group: &Group<'_>,
        part: &Part,
        (cache, layer): (&LatentCache<u16>, usize),
        (q, scale): (&[f32], f32),
        mut sink: impl FnMut(usize, usize, [f32; 2], &[f32]),
    ) {
        let (shape, rows) = (cache.shape(), group.rows(part.split));
        let seen = |row: usize| SPLIT.min(group.keys(row) - part.split * SPLIT);
        let count = seen(rows.end - 1);
        let blocks: Vec<&[u16]> = group.blocks[part.split * SPLIT / BLOCK..]
            .iter()
            .zip((0..count).step_by(BLOCK))
            .map(|(block, first)| cache.block(layer, *block, BLOCK.min((count - first).next_multiple_of(WIDTH))))
            .collect();
        let rows_of_cache = BlockRows { blocks: &blocks, stride: stride(shape) };
        let split = Split { keys: rows_of_cache, values: rows_of_cache, width: shape.latent, count, scale };
        let query = |row: usize, head: usize| ((group.first + row) * shape.heads + head) as u32;
        let picked: Vec<u32> =
            rows.clone().flat_map(|row| part.heads.clone().map(move |head| query(row, head))).collect();
        let queries = Inputs { rows: picked.len(), picked: Some(&picked), ..Inputs::new(q, shape.cached()) };
        let place = |index: usize| (rows.start + index / part.heads.len(), part.heads.start + index % part.heads.len());
        split.reduce(
            (&self.pool, self.kernels),
            queries,
            |index| seen(place(index).0),
            |index, statistics, latents| {
                let (row, head) = place(index);
                sink(row, head, statistics, latents);
            },
        );
    }

    /// Merges the splits of each row and head in ascending order.
    fn merge(&self, groups: &[Group<'_>], heads: usize, latent: usize, partials: &[f32], out: &mut [f32]) {
        let of_split = heads * (latent + 2);
        let out = Grid::new(out, latent);
        let splits: usize = groups.iter().map(|group| group.count * group.splits()).sum();
        // Of one group and head.
        let units = groups.len() * heads;
        let at_once = tasks::at_once(&self.pool, units, (splits * of_split).div_ceil(units.max(1)));
        self.pool.run(units.div_ceil(at_once), |task| {
            for unit in task * at_once..units.min((task + 1) * at_once) {
                let (group, head) = (&groups[unit / heads], unit % heads);
                for row in 0..group.count {
                    let partials = &partials[group.partials + row * group.splits() * of_split..];
                    let partials = &partials[..group.keys(row).div_ceil(SPLIT) * of_split];
                    let splits = partials.chunks_exact(latent + 2).skip(head).step_by(heads);
                    // SAFETY: each group and head belongs to one task.
                    merge_splits(splits, unsafe { out.part((group.first + row) * heads + head, 0..latent) });
                }
            }
        });
    }
}

/// As many rows together as one task takes with all their heads.
fn groups_of(span: &RowSpan, heads: usize) -> impl Iterator<Item = Group<'_>> + use<'_> {
    let &RowSpan { first_row, rows, first_position, ref blocks, .. } = span;
    let together = (QUERIES / heads).max(1);
    (0..rows).step_by(together).map(move |row| Group {
        first: first_row + row,
        count: together.min(rows - row),
        position: first_position + row,
        blocks,
        partials: 0,
    })
}

/// How the cut goes changes no bit.
fn parts_of(groups: &[Group<'_>], heads: usize, threads: usize) -> Vec<Part> {
    let splits: usize = groups.iter().map(Group::splits).sum();
    let at_once = if splits * heads.div_ceil(QUERIES) < threads { HEADS } else { QUERIES };
    let parts = groups.iter().enumerate().flat_map(|(group, of)| (0..of.splits()).map(move |split| (group, split)));
    let heads = (0..heads).step_by(at_once).map(|first| first..heads.min(first + at_once));
    parts.flat_map(|(group, split)| heads.clone().map(move |heads| Part { group, split, heads })).collect()
}
