//! What one position leaves in the latent cache.

use super::{rms_norm::rms_norm, rope::rope};

/// Epsilon of the latent norms: fixed in the model, whatever its config says of the layer norms.
pub(crate) const LATENT_EPS: f32 = 1e-6;

/// `kv [r + dr]` → `out [r + dr]`: the normed latent, then the roped key. `gain [r]`.
pub(crate) fn latent(kv: &[f32], gain: &[f32], (cos, sin): (&[f32], &[f32]), out: &mut [f32]) {
    let (out_latent, out_key) = out.split_at_mut(gain.len());
    rms_norm(&kv[..gain.len()], gain, LATENT_EPS, out_latent);
    out_key.copy_from_slice(&kv[gain.len()..]);
    rope(out_key, cos, sin);
}
