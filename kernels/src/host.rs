//! Buffers of devices that compute in the host's memory.

use crate::{Dtype, activation, scratch::Scratch};

/// Makes a buffer exactly `length` long; its content is to be overwritten.
pub(crate) fn fit(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, 0.0);
    buffer
}

/// Decodes values of `dtype`.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) {
    activation::decode_into(dtype, bytes, fit(out, bytes.len() / dtype.size()));
}

/// Decodes values of `dtype` that come in parts, one after the other.
pub(crate) fn decode_parts(dtype: Dtype, parts: &[&[u8]]) -> Scratch {
    let mut values = Scratch::take(parts.iter().map(|part| part.len() / dtype.size()).sum());
    let mut rest = &mut *values;
    for part in parts {
        let (values, others) = rest.split_at_mut(part.len() / dtype.size());
        activation::decode_into(dtype, part, values);
        rest = others;
    }
    values
}

/// Some rows of each `x [_, width]`, one behind the other.
pub(crate) fn gather(parts: &[(&Vec<f32>, &[u32])], width: usize, out: &mut Vec<f32>) {
    out.clear();
    for (x, rows) in parts {
        rows.iter().for_each(|row| out.extend_from_slice(&x[*row as usize * width..][..width]));
    }
}

/// `x += delta`
pub(crate) fn add(x: &mut [f32], delta: &[f32]) {
    assert_eq!(x.len(), delta.len(), "values to be added");
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
}

/// `x += a + b`
pub(crate) fn add_two(x: &mut [f32], a: &[f32], b: &[f32]) {
    assert_eq!((x.len(), x.len()), (a.len(), b.len()), "values to be added");
    x.iter_mut().zip(a).zip(b).for_each(|((x, a), b)| *x += a + b);
}
