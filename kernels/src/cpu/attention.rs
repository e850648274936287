//! Absorbed attention over the latent cache.
//!
//! A task takes a few rows of one sequence, and some heads of each, through one split after the other: the keys of a split are
//! read once for all of them, and what they come to is merged at once. Where that would leave threads without work, each split
//! is a task of its own ([`parallel`]).
#![allow(unsafe_code)]

mod parallel;

use std::ops::Range;

use super::{
    Cpu,
    inputs::Inputs,
    sink::{Merged, Sink},
    split::{BlockRows, Queries, Split},
};
use crate::{
    Device, MlaShape, RowSpan,
    cache::LatentCache,
    grid::Grid,
    panels::{STEPS, WIDTH},
    tasks,
};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;
/// Queries (one for each row and head) that one task takes through a split: enough that packing its keys costs little, and so
/// few that their scores and sums stay in the second cache.
const QUERIES: usize = 96;
/// Heads that one task takes at least, if there are fewer tasks than threads.
const HEADS: usize = 8;
/// A group of rows goes through all its splits as one task if that is this share of what is one elsewhere, since groups are few
/// and not of the same work.
const SHARE: usize = 4;

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

    /// Keys of a split that a row sees.
    fn seen(&self, row: usize, split: usize) -> usize {
        self.keys(row).saturating_sub(split * SPLIT).min(SPLIT)
    }

    /// Which of all queries of the batch, `all` a row, are of some heads of the group.
    fn queries(&self, heads: &Range<usize>, all: usize) -> impl Iterator<Item = usize> + use<> {
        let heads = heads.clone();
        (self.first..self.first + self.count).flat_map(move |row| heads.clone().map(move |head| row * all + head))
    }

    /// Multiply-adds.
    fn work(&self, shape: &MlaShape) -> usize {
        self.count * self.keys(self.count - 1) * shape.heads * (shape.cached() + shape.latent)
    }
}

/// Attention of one layer.
struct Layer<'a> {
    cpu: &'a Cpu,
    cache: &'a LatentCache<u16>,
    layer: usize,
    /// Absorbed queries `[rows, heads, r + dr]`.
    q: &'a [f32],
    scale: f32,
}

impl Cpu {
    pub(super) fn attention(
        &self,
        (cache, layer): (&LatentCache<u16>, usize),
        q: &[f32],
        spans: &[RowSpan],
        scale: f32,
        out: &mut [f32],
    ) {
        let shape = cache.shape();
        let absorbed = spans.iter().filter(|span| !span.expanded);
        let groups: Vec<Group<'_>> = absorbed.flat_map(|span| groups_of(span, shape.heads)).collect();
        let work = groups.iter().map(|group| group.work(shape)).sum();
        let of_one = tasks::work_of_one(&self.pool, work) / SHARE;
        let small = |group: &Group<'_>| group.splits() == 1 || group.work(shape) <= of_one;
        let (small, large): (Vec<_>, Vec<_>) = groups.into_iter().partition(small);
        let layer = Layer { cpu: self, cache, layer, q, scale };
        layer.attend(&small, out);
        layer.attend_in_parallel(&large, out);
    }
}

impl Layer<'_> {
    /// Takes groups through all their splits: `out [rows, heads, r]`.
    fn attend(&self, groups: &[Group<'_>], out: &mut [f32]) {
        let shape = self.cache.shape();
        let out = Grid::new(out, shape.latent);
        let heads = heads_of_tasks(shape.heads, groups.len(), self.cpu.pool.threads());
        let work = groups.iter().map(|group| group.work(shape)).sum();
        tasks::run(&self.cpu.pool, groups.len() * heads.len(), work, |unit| {
            let (group, heads) = (&groups[unit / heads.len()], &heads[unit % heads.len()]);
            // SAFETY: the rows and heads of a unit are its own.
            let row = |query: usize| unsafe { out.part(query, 0..shape.latent) };
            let mut merged = Merged::new(group.queries(heads, shape.heads).map(row));
            let queries = self.queries(group, heads);
            for split in 0..group.splits() {
                self.reduce(group, split, (&queries, heads.len()), &mut merged);
            }
            merged.finish();
        });
    }

    /// The queries of all rows of a group, of some heads each.
    fn queries(&self, group: &Group<'_>, heads: &Range<usize>) -> Queries<'_> {
        let shape = self.cache.shape();
        let picked: Vec<u32> = group.queries(heads, shape.heads).map(|query| query as u32).collect();
        let queries = Inputs { rows: picked.len(), picked: Some(&picked), ..Inputs::new(self.q, shape.cached()) };
        Queries::new(&self.cpu.pool, self.cpu.kernels, queries)
    }

    /// Reduces one split of a group for its queries, so many `heads` of each row.
    fn reduce(&self, group: &Group<'_>, split: usize, (queries, heads): (&Queries<'_>, usize), sink: &mut impl Sink) {
        let shape = self.cache.shape();
        let count = group.seen(group.count - 1, split);
        let blocks: Vec<&[u16]> = group.blocks[split * SPLIT / BLOCK..]
            .iter()
            .zip((0..count).step_by(BLOCK))
            .map(|(block, first)| {
                self.cache.block(self.layer, *block, BLOCK.min((count - first).next_multiple_of(WIDTH)))
            })
            .collect();
        let rows = BlockRows { blocks: &blocks, stride: stride(shape) };
        let reduced = Split { keys: rows, values: rows, width: shape.latent, count, scale: self.scale };
        let on = (&*self.cpu.pool, self.cpu.kernels);
        reduced.reduce(on, queries, |query| group.seen(query / heads, split), sink);
    }
}

/// As many rows together as one task takes with all their heads.
fn groups_of(span: &RowSpan, heads: usize) -> impl Iterator<Item = Group<'_>> + use<'_> {
    let &RowSpan { first_row, rows, first_position, ref blocks, .. } = span;
    let groups = rows.div_ceil((QUERIES / heads).max(1));
    let from = move |group: usize| rows * group / groups;
    (0..groups).map(move |group| Group {
        first: first_row + from(group),
        count: from(group + 1) - from(group),
        position: first_position + from(group),
        blocks,
    })
}

/// Which heads go together where there are so many units of work for all of them. How the cut goes changes no bit.
fn heads_of_tasks(heads: usize, units: usize, threads: usize) -> Vec<Range<usize>> {
    let parts = heads.div_ceil(QUERIES);
    let at_once = if units * parts < threads { HEADS } else { heads.div_ceil(parts) };
    (0..heads).step_by(at_once).map(|first| first..heads.min(first + at_once)).collect()
}
