//! Root mean square norm.

/// `out [H] = gain ⊙ x / sqrt(mean(x²) + eps)`; squares are summed in ascending order.
pub(crate) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
        *out = gain * (x * scale);
    }
}
