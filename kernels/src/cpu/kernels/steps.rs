//! Inputs packed for dot products of pairs and for matrix tiles: 32 steps of each row after the other.

use crate::panels::{Element, STEPS, WIDTH};

/// Lays out rows, rounded to `T`: `to [depth / 32][R][32]`, with zeros past the end of the rows.
#[inline(always)]
pub(super) fn pack<T: Element>(rows: &[&[f32]], to: &mut [T]) {
    for (at, row) in rows.iter().enumerate() {
        for (index, to) in to.chunks_exact_mut(rows.len() * STEPS).enumerate() {
            let row = row.get(index * STEPS..).unwrap_or_default();
            let to = &mut to[at * STEPS..][..STEPS];
            let (used, rest) = to.split_at_mut(row.len().min(STEPS));
            used.iter_mut().zip(row).for_each(|(to, x)| *to = T::narrow(*x));
            rest.fill(T::zeroed());
        }
    }
}

/// Checks that packed rows of `elements` elements, panels and sums fit together, and gives the number of rows.
#[inline(always)]
pub(super) fn check(elements: usize, panels: &[&[u16]], sums: &[[f32; WIDTH]]) -> usize {
    let rows = sums.len() / panels.len().max(1);
    assert_eq!(rows * panels.len(), sums.len(), "sums of {} panels", panels.len());
    assert!(elements.is_multiple_of((rows * STEPS).max(1)), "whole strips of rows");
    assert!(panels.iter().all(|panel| panel.len() * rows == elements * WIDTH), "panels as long as the rows");
    rows
}
