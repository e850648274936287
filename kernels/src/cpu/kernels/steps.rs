//! Packed inputs: some steps of each row after the other.

use bytemuck::Pod;

use super::Strip;
use crate::panels::{STEPS, WIDTH};

/// Lays out rows: `to [depth / strip][rows][strip]`, the last strip being shorter, with zeros past the end of the rows.
/// `write` converts elements.
#[inline(always)]
pub(super) fn pack<T: Pod>(rows: &[&[f32]], strip: usize, to: &mut [T], write: impl Fn(&[f32], &mut [T])) {
    for (index, to) in to.chunks_mut((rows.len() * strip).max(1)).enumerate() {
        let steps = to.len() / rows.len();
        for (to, row) in to.chunks_exact_mut(steps).zip(rows) {
            let row = row.get(index * strip..).unwrap_or_default();
            let (used, rest) = to.split_at_mut(row.len().min(steps));
            write(&row[..used.len()], used);
            rest.fill(T::zeroed());
        }
    }
}

/// Checks that packed rows of `elements` elements, a strip and sums fit together, and gives the number of rows.
#[inline(always)]
pub(super) fn check<T>(elements: usize, Strip { panels, scales, .. }: Strip<'_, T>, sums: &[[f32; WIDTH]]) -> usize {
    let rows = sums.len() / panels.len().max(1);
    assert_eq!(rows * panels.len(), sums.len(), "sums of {} panels", panels.len());
    assert!(elements.is_multiple_of((rows * STEPS).max(1)), "whole strips of rows");
    assert!(panels.iter().all(|panel| panel.len() * rows == elements * WIDTH), "panels as long as the rows");
    assert!(scales.is_none_or(|scales| scales.len() == panels.len()), "scales of {} panels", panels.len());
    rows
}
