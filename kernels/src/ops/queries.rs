//! Absorbed queries of multi-head latent attention.

use super::{linear::Matrix, rope::rope};

/// One head of one row: `q [dn + dr]` → `out [r + dr]`: `UKᵀ · q_nope`, then the roped `q_pe`. `uk [r, dn]`.
pub(crate) fn query(q: &[f32], uk: &Matrix, (cos, sin): (&[f32], &[f32]), out: &mut [f32]) {
    let (latent, nope) = uk.shape();
    let (out_latent, out_rope) = out.split_at_mut(latent);
    uk.row(&q[..nope], out_latent);
    out_rope.copy_from_slice(&q[nope..]);
    rope(out_rope, cos, sin);
}
