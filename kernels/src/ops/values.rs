//! Values of multi-head latent attention.

use super::linear::Matrix;

/// One head of one row: `out [dv] = UV · o_lat [r]`. `uv [dv, r]`.
pub(crate) fn value(o_lat: &[f32], uv: &Matrix, out: &mut [f32]) {
    uv.row(o_lat, out);
}
