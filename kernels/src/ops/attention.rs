//! Absorbed causal attention over latents, in fixed splits of positions.
//!
//! Every head of a row sees the same keys `[r + dr]`, and the values are the first `r` elements of the keys. A split is
//! reduced to `[max, sum, latents..]` a head: the largest score, the sum of `exp(score − max)`, and the latents summed
//! with those weights. Splits are aligned to absolute position and merged in ascending order, so that a row's bits
//! depend on its own position alone.

/// Heads reduced side by side.
pub(crate) const HEADS: usize = 8;

/// The queries of up to eight heads with the heads innermost: `q [heads, len]` → `[len]` of eight heads, padded by zeros.
pub(crate) fn interleave(q: &[f32], length: usize, out: &mut Vec<[f32; HEADS]>) {
    out.clear();
    out.resize(length, [0.0; HEADS]);
    for (head, q) in q.chunks_exact(length).enumerate() {
        out.iter_mut().zip(q).for_each(|(out, q)| out[head] = *q);
    }
}

/// Reduces the keys of one split for up to eight heads.
///
/// `q [r + dr]` as of [`interleave`]; `keys` in ascending position; `out [heads, r + 2]`. Scores are summed over the
/// elements, weights and latents over the positions, all in ascending order.
pub(crate) fn reduce_split<'a>(
    q: &[[f32; HEADS]],
    keys: impl Iterator<Item = &'a [f32]> + Clone,
    scale: f32,
    scores: &mut Vec<[f32; HEADS]>,
    out: &mut [f32],
    latent: usize,
) {
    scores.clear();
    let mut max = [f32::NEG_INFINITY; HEADS];
    for key in keys.clone() {
        let score = score(q, key).map(|score| score * scale);
        max = std::array::from_fn(|head| max[head].max(score[head]));
        scores.push(score);
    }
    let mut sum = [0.0; HEADS];
    for score in scores.iter_mut() {
        *score = std::array::from_fn(|head| libm::expf(score[head] - max[head]));
        sum = std::array::from_fn(|head| sum[head] + score[head]);
    }
    for (head, out) in out.chunks_exact_mut(latent + 2).enumerate() {
        let (statistics, latents) = out.split_at_mut(2);
        statistics.copy_from_slice(&[max[head], sum[head]]);
        latents.fill(0.0);
        for (weights, key) in scores.iter().zip(keys.clone()) {
            latents.iter_mut().zip(key).for_each(|(sum, value)| *sum += weights[head] * value);
        }
    }
}

fn score(q: &[[f32; HEADS]], key: &[f32]) -> [f32; HEADS] {
    let mut score = [0.0; HEADS];
    for (q, key) in q.iter().zip(key) {
        score.iter_mut().zip(q).for_each(|(score, q)| *score += q * key);
    }
    score
}

/// Merges the splits of one head, each `[max, sum]` and latents, in ascending order: `out [r]`.
pub(crate) fn merge_splits<'a>(splits: impl Iterator<Item = (&'a [f32], &'a [f32])>, out: &mut [f32]) {
    let mut so_far = NO_SPLIT;
    out.fill(0.0);
    for (statistics, latents) in splits {
        let factors = merge_statistics(&mut so_far, [statistics[0], statistics[1]]);
        merge_values(factors, out, latents);
    }
    out.iter_mut().for_each(|out| *out /= so_far[1]);
}

/// `[max, sum]` of no split; its values are zeros.
pub(crate) const NO_SPLIT: [f32; 2] = [f32::NEG_INFINITY, 0.0];

/// Merges `[max, sum]` of one more split into those before it. What values are multiplied by: those before, and those of the
/// split.
pub(crate) fn merge_statistics(so_far: &mut [f32; 2], split: [f32; 2]) -> [f32; 2] {
    let larger = so_far[0].max(split[0]);
    let (keep, take) = (libm::expf(so_far[0] - larger), libm::expf(split[0] - larger));
    *so_far = [larger, so_far[1] * keep + split[1] * take];
    [keep, take]
}

/// Merges values of a split into those before it.
#[inline]
pub(crate) fn merge_values([keep, take]: [f32; 2], sums: &mut [f32], values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = *sum * keep + value * take);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_merge_to_the_whole() {
        let keys: Vec<[f32; 3]> =
            (0..40).map(|at| [(at as f32).sin(), (at as f32 * 0.7).cos(), at as f32 * 0.1]).collect();
        let query = [0.5, -1.5, 2.0];
        let mut q = Vec::new();
        interleave(&query, 3, &mut q);
        let part = |range: std::ops::Range<usize>| {
            let mut out = vec![0.0; 4];
            reduce_split(&q, keys[range].iter().map(|key| &key[..]), 0.25, &mut Vec::new(), &mut out, 2);
            out
        };
        let mut found = [0.0; 2];
        merge_splits([part(0..16), part(16..32), part(32..40)].iter().map(|part| part.split_at(2)), &mut found);

        let weights: Vec<f64> = keys
            .iter()
            .map(|key| (key.iter().zip(query).map(|(key, q)| f64::from(*key) * f64::from(q)).sum::<f64>() * 0.25).exp())
            .collect();
        for (at, found) in found.iter().enumerate() {
            let sum: f64 = weights.iter().zip(&keys).map(|(weight, key)| weight * f64::from(key[at])).sum();
            assert!((f64::from(*found) - sum / weights.iter().sum::<f64>()).abs() < 1e-6);
        }
    }
}
