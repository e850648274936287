//! The largest logits of many.

use super::order;

/// Logits of which the largest stands for all, where only a few are looked for.
const CHUNK: usize = 64;
/// Logits that are compared side by side.
const LANES: usize = 16;

/// The largest logit; negative infinity of none. No logit is NaN.
pub(super) fn largest(logits: &[f32]) -> f32 {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        largest
            .iter_mut()
            .zip(chunk)
            .for_each(|(largest, logit)| *largest = if logit > largest { *logit } else { *largest });
    }
    largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The first place of the largest logit.
pub(super) fn place_of(largest_of_all: f32, logits: &[f32]) -> usize {
    let chunk = logits.chunks(CHUNK).position(|chunk| largest(chunk) == largest_of_all).unwrap_or(0) * CHUNK;
    chunk + logits[chunk..].iter().position(|logit| *logit == largest_of_all).unwrap_or(0)
}

/// Places of the `count` best logits, best first: the larger logit, then the lower place. Those of negative infinity are left
/// out.
pub(super) fn best(logits: &[f32], count: usize) -> Vec<u32> {
    let bound = bound(logits, count);
    let mut found: Vec<(u32, f32)> =
        (0..).zip(logits.iter().copied()).filter(|(_, logit)| *logit >= bound && *logit > f32::NEG_INFINITY).collect();
    if count < found.len() {
        found.select_nth_unstable_by(count, |a, b| order(*a, *b));
        found.truncate(count);
    }
    found.sort_unstable_by(|a, b| order(*a, *b));
    found.into_iter().map(|(place, _)| place).collect()
}

/// A number that at least `count` logits reach, and few others: so many chunks have one that does.
fn bound(logits: &[f32], count: usize) -> f32 {
    if count == 0 || count > logits.len().div_ceil(CHUNK) {
        return f32::NEG_INFINITY;
    }
    let mut largest: Vec<f32> = logits.chunks(CHUNK).map(largest).collect();
    *largest.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_best_are_those_that_sorting_finds(
            logits in prop::collection::vec(prop_oneof![9 => (-20i8..20).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY)], 0..1000),
            count in 0usize..40,
        ) {
            let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).filter(|(_, x)| x.is_finite()).collect();
            sorted.sort_by(|a, b| order(*a, *b));
            let places: Vec<u32> = sorted.iter().map(|(place, _)| *place).collect();
            prop_assert_eq!(largest(&logits), sorted.first().map_or(f32::NEG_INFINITY, |(_, logit)| *logit));
            if let Some((place, logit)) = sorted.first() {
                prop_assert_eq!(place_of(*logit, &logits), *place as usize);
            }
            prop_assert_eq!(&best(&logits, count), &places[..count.min(places.len())]);
            prop_assert_eq!(best(&logits, logits.len()), places);
        }
    }
}
