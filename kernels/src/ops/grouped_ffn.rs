//! Grouped feed-forward: what one expert adds to the sum of a row.

/// `out [H] += weight · y [H]`; the experts of a slot come one after the other, in the order they are given.
pub(crate) fn add_weighted(weight: f32, y: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
}
