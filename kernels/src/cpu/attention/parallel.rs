//! Attention of few rows with many splits: each split is a task of its own, and what they come to is merged afterwards.
#![allow(unsafe_code)]

use super::{super::sink::Kept, Group, Layer, SPLIT, heads_of_tasks};
use crate::{grid::Grid, ops::attention::merge_splits, scratch::Scratch, tasks};

/// Reduced splits held at a time, in elements; more where a single group of rows needs them.
const PARTIALS: usize = 4 << 20;

/// A group, and where its splits begin among the partial results.
struct Placed<'a> {
    group: &'a Group<'a>,
    /// In results of one head.
    first: usize,
}

impl Placed<'_> {
    /// Where the result of a row, split and head lies, of so many `heads`.
    fn place(&self, row: usize, split: usize, (head, heads): (usize, usize)) -> usize {
        self.first + (row * self.group.splits() + split) * heads + head
    }
}

/// The splits of all groups, `[groups][rows, splits, heads]` each.
struct Partials {
    /// `[max, sum]`
    statistics: Scratch,
    /// `[r]`
    values: Scratch,
}

impl Layer<'_> {
    /// As [`Layer::attend`], a task for each split.
    pub(super) fn attend_in_parallel(&self, groups: &[Group<'_>], out: &mut [f32]) {
        let shape = self.cache.shape();
        let mut rest = groups.iter().peekable();
        while rest.peek().is_some() {
            let (mut first, mut placed) = (0, Vec::new());
            while let Some(group) = rest.next_if(|_| first == 0 || first * shape.latent < PARTIALS) {
                placed.push(Placed { group, first });
                first += group.count * group.splits() * shape.heads;
            }
            let partials = self.reduce_all(&placed, first);
            self.merge(&placed, &partials, out);
        }
    }

    /// Reduces each split of each row and head, so many results.
    fn reduce_all(&self, placed: &[Placed<'_>], results: usize) -> Partials {
        let (shape, pool) = (self.cache.shape(), &self.cpu.pool);
        let splits: Vec<(&Placed<'_>, usize)> =
            placed.iter().flat_map(|placed| (0..placed.group.splits()).map(move |split| (placed, split))).collect();
        let heads = heads_of_tasks(shape.heads, splits.len(), pool.threads());
        let mut partials =
            Partials { statistics: Scratch::take(2 * results), values: Scratch::take(shape.latent * results) };
        let (statistics, values) =
            (Grid::new(&mut partials.statistics, 2), Grid::new(&mut partials.values, shape.latent));
        let work = placed.iter().map(|placed| placed.group.work(shape)).sum();
        tasks::run(pool, splits.len() * heads.len(), work, |unit| {
            let ((placed, split), heads) = (splits[unit / heads.len()], &heads[unit % heads.len()]);
            let group = placed.group;
            let of_row = |row| heads.clone().map(move |head| placed.place(row, split, (head, shape.heads)));
            let places = (0..group.count).flat_map(of_row);
            // SAFETY: each unit has a split and heads of its own.
            let part = |place| unsafe { (statistics.part(place, 0..2), values.part(place, 0..shape.latent)) };
            let queries = self.queries(group, heads);
            self.reduce(group, split, (&queries, heads.len()), &mut Kept(places.map(part).collect()));
        });
        partials
    }

    /// Merges the splits of each row and head in ascending order.
    fn merge(&self, placed: &[Placed<'_>], partials: &Partials, out: &mut [f32]) {
        let (shape, pool) = (self.cache.shape(), &self.cpu.pool);
        let (heads, latent) = (shape.heads, shape.latent);
        let out = Grid::new(out, latent);
        tasks::run(pool, placed.len() * heads, partials.values.len(), |unit| {
            let (placed, head) = (&placed[unit / heads], unit % heads);
            let group = placed.group;
            for row in 0..group.count {
                // SAFETY: each group and head belongs to one task.
                let out = unsafe { out.part((group.first + row) * heads + head, 0..latent) };
                let splits =
                    (0..group.keys(row).div_ceil(SPLIT)).map(|split| placed.place(row, split, (head, heads))).map(
                        |place| (&partials.statistics[2 * place..][..2], &partials.values[place * latent..][..latent]),
                    );
                merge_splits(splits, out);
            }
        });
    }
}
