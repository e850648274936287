//! Rotary embedding on adjacent pairs, as the checkpoint lays them out.

/// Rotates components `(2i, 2i + 1)` of `x [dr]` by the angle of pair `i`, in place. `cos`, `sin`: `[dr / 2]`.
pub(crate) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (pairs, _) = x.as_chunks_mut::<2>();
    for (([even, odd], cos), sin) in pairs.iter_mut().zip(cos).zip(sin) {
        (*even, *odd) = (*even * cos - *odd * sin, *odd * cos + *even * sin);
    }
}
