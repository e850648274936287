//! Attention of few rows with many splits: each split is a task of its own, and what they come to is merged afterwards.
#![allow(unsafe_code)]

use super::{Group, Layer, heads_of_tasks};
use crate::{grid::Grid, ops::attention::merge_splits, scratch::Scratch, tasks};

use super::super::sink::Kept;

/// Reduced splits held at a time, in elements; more where a single group of rows needs them.
const PARTIALS: usize = 4 << 20;

/// A group, and where its splits begin among the partial results.
struct Placed<'a> {
    group: &'a Group<'a>,
    /// In results of one head.
    first: usize,
}

impl Layer<'_> {
    /// As [`Layer::attend`], a task for each split.
    pub(super) fn attend_in_parallel(&self, groups: &[Group<'_>], out: &mut [f32]) {
        let shape = self.cache.shape();
        let of_head = shape.latent + 2;
        let mut rest = groups.iter().peekable();
        while rest.peek().is_some() {
            let (mut first, mut placed) = (0, Vec::new());
            while let Some(group) = rest.next_if(|_| first == 0 || first * of_head < PARTIALS) {
                placed.push(Placed { group, first });
                first += group.count * group.splits() * shape.heads;
            }
            let mut partials = Scratch::take(first * of_head);
            self.reduce_all(&placed, &mut partials);
            self.merge(&placed, &partials, out);
        }
    }

    /// Reduces each split of each row and head: `partials [groups][rows, splits, heads, r + 2]`.
    fn reduce_all(&self, placed: &[Placed<'_>], partials: &mut [f32]) {
        let (shape, pool) = (self.cache.shape(), &self.cpu.pool);
        let of_head = shape.latent + 2;
        let splits: Vec<(&Placed<'_>, usize)> =
            placed.iter().flat_map(|placed| (0..placed.group.splits()).map(move |split| (placed, split))).collect();
        let heads = heads_of_tasks(shape.heads, splits.len(), pool.threads());
        let units = splits.len() * heads.len();
        let work: usize = placed.iter().map(|placed| placed.group.work(shape)).sum();
        let at_once = tasks::at_once(pool, units, work.div_ceil(units.max(1)));
        let grid = Grid::new(partials, of_head);
        pool.run(units.div_ceil(at_once), |task| {
            for unit in task * at_once..units.min((task + 1) * at_once) {
                let ((Placed { group, first }, split), heads) =
                    (splits[unit / heads.len()], &heads[unit % heads.len()]);
                let place = |row: usize, head: usize| first + (row * group.splits() + split) * shape.heads + head;
                let places = (0..group.count).flat_map(|row| heads.clone().map(move |head| place(row, head)));
                // SAFETY: each unit has a split and heads of its own.
                let kept = places.map(|place| unsafe { grid.part(place, 0..of_head) }).collect();
                let queries = self.queries(group, heads);
                self.reduce(group, split, (queries.of(0), heads.len()), &mut Kept(kept));
            }
        });
    }

    /// Merges the splits of each row and head in ascending order.
    fn merge(&self, placed: &[Placed<'_>], partials: &[f32], out: &mut [f32]) {
        let (shape, pool) = (self.cache.shape(), &self.cpu.pool);
        let (heads, of_head) = (shape.heads, shape.latent + 2);
        let out = Grid::new(out, shape.latent);
        // Of one group and head.
        let units = placed.len() * heads;
        let at_once = tasks::at_once(pool, units, partials.len().div_ceil(units.max(1)));
        pool.run(units.div_ceil(at_once), |task| {
            for unit in task * at_once..units.min((task + 1) * at_once) {
                let (Placed { group, first }, head) = (&placed[unit / heads], unit % heads);
                for row in 0..group.count {
                    let splits = partials[(first + row * group.splits() * heads) * of_head..].chunks_exact(of_head);
                    let splits = splits.skip(head).step_by(heads).take(group.keys(row).div_ceil(super::SPLIT));
                    // SAFETY: each group and head belongs to one task.
                    merge_splits(splits, unsafe { out.part((group.first + row) * heads + head, 0..shape.latent) });
                }
            }
        });
    }
}
