//! Where the reduced splits of some queries go: merged as they come, or kept to be merged later.

use super::products::put;
use crate::{
    ops::attention::{NO_SPLIT, merge_statistics, merge_values},
    panels::WIDTH,
};

/// Takes one reduced split of each query.
pub(super) trait Sink {
    /// The largest score of a query, and the sum of its weights. Comes before the values.
    fn statistics(&mut self, query: usize, statistics: [f32; 2]);

    /// What these weights sum up to, from element `first` on: as many as there are, up to the end.
    fn values(&mut self, query: usize, first: usize, values: &[f32; WIDTH]);
}

/// Splits in ascending order, merged as they come.
pub(super) struct Merged<'a> {
    queries: Vec<Query<'a>>,
}

struct Query<'a> {
    /// `[max, sum]`
    so_far: [f32; 2],
    /// What values of the split that comes are merged by: see [`merge_statistics`].
    factors: [f32; 2],
    values: &'a mut [f32],
}

impl<'a> Merged<'a> {
    /// No splits yet; values of each query are gathered in its row.
    pub(super) fn new(rows: impl Iterator<Item = &'a mut [f32]>) -> Self {
        let query = |values: &'a mut [f32]| {
            values.fill(0.0);
            Query { so_far: NO_SPLIT, factors: [1.0, 0.0], values }
        };
        Self { queries: rows.map(query).collect() }
    }

    /// Divides the values of each query by the sum of its weights: the end.
    pub(super) fn finish(self) {
        for Query { so_far: [_, sum], values, .. } in self.queries {
            values.iter_mut().for_each(|value| *value /= sum);
        }
    }
}

impl Sink for Merged<'_> {
    fn statistics(&mut self, query: usize, statistics: [f32; 2]) {
        let query = &mut self.queries[query];
        query.factors = merge_statistics(&mut query.so_far, statistics);
    }

    #[inline]
    fn values(&mut self, query: usize, first: usize, values: &[f32; WIDTH]) {
        let query = &mut self.queries[query];
        let to = room(query.values, first);
        match <&mut [f32; WIDTH]>::try_from(&mut *to) {
            // A copy, so that the loop becomes vectors.
            Ok(to) => {
                let mut sums = *to;
                merge_values(query.factors, &mut sums, values);
                *to = sums;
            }
            Err(_) => merge_values(query.factors, to, values),
        }
    }
}

/// One split of each query as it is: `[max, sum]` in the first of these, values in the second.
pub(super) struct Kept<'a>(pub(super) Vec<(&'a mut [f32], &'a mut [f32])>);

impl Sink for Kept<'_> {
    fn statistics(&mut self, query: usize, statistics: [f32; 2]) {
        self.0[query].0.copy_from_slice(&statistics);
    }

    #[inline]
    fn values(&mut self, query: usize, first: usize, values: &[f32; WIDTH]) {
        put(values, room(self.0[query].1, first));
    }
}

/// Sixteen values of a row, or fewer at its end.
fn room(row: &mut [f32], first: usize) -> &mut [f32] {
    let end = row.len().min(first + WIDTH);
    &mut row[first..end]
}
