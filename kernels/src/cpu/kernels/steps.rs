//! Packed inputs: some steps of each row after the other.

use bytemuck::Pod;

use super::Strip;
use crate::{
    panels::{STEPS, WIDTH},
    scratch::Scratch,
};

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

/// Runs `add`, which adds products to sums, on parts from zero; these, times the scales of their panels, are then added to
/// `sums [panels][rows]`. Without scales, on the sums themselves.
pub(super) fn scaled(scales: Option<&[f32]>, sums: &mut [[f32; WIDTH]], add: impl FnOnce(&mut [[f32; WIDTH]])) {
    let Some(scales) = scales else { return add(sums) };
    let mut parts = Scratch::take(sums.as_flattened().len());
    parts.fill(0.0);
    add(parts.as_chunks_mut().0);
    let sums = sums.as_flattened_mut();
    let of_panel = sums.len() / scales.len().max(1);
    for ((sums, parts), scale) in sums.chunks_exact_mut(of_panel).zip(parts.chunks_exact(of_panel)).zip(scales) {
        sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += scale * part);
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
