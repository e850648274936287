//! Activations as bytes: bf16 rounding, and rows of f32 to and from the little-endian wire form.
//!
//! bf16 is rounded to nearest, ties to even; what overflows becomes infinite, and NaN stays NaN.

use crate::Dtype;

/// The bits of `x` rounded to bf16.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet_nan } else { rounded }) as u16
}

/// The value of bf16 bits.
#[inline(always)]
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds every value to `dtype`, in place.
pub fn round(dtype: Dtype, values: &mut [f32]) {
    match dtype {
        Dtype::F32 => {}
        Dtype::Bf16 => values.iter_mut().for_each(|value| *value = from_bf16(to_bf16(*value))),
    }
}

/// `values` rounded to `dtype`, as little-endian bytes.
pub fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(dtype, values, &mut bytes);
    bytes
}

/// Appends `values`, rounded to `dtype`, to `bytes`.
pub fn encode_into(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) {
    let start = bytes.len();
    bytes.resize(start + values.len() * dtype.size(), 0);
    let to = &mut bytes[start..];
    match dtype {
        Dtype::F32 => to.chunks_exact_mut(4).zip(values).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes())),
        Dtype::Bf16 => {
            to.chunks_exact_mut(2).zip(values).for_each(|(to, x)| to.copy_from_slice(&to_bf16(*x).to_le_bytes()));
        }
    }
}

/// Appends the values that `bytes` holds; a trailing part of an element is left out.
pub fn decode(dtype: Dtype, bytes: &[u8], values: &mut Vec<f32>) {
    let start = values.len();
    let count = bytes.len() / dtype.size();
    values.resize(start + count, 0.0);
    decode_into(dtype, &bytes[..count * dtype.size()], &mut values[start..]);
}

/// Decodes into `values`.
///
/// # Panics
/// When `bytes` does not hold exactly `values.len()` elements.
pub fn decode_into(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    assert_eq!(bytes.len(), values.len() * dtype.size(), "bytes of {} values of {dtype}", values.len());
    match dtype {
        Dtype::F32 => {
            let (elements, _) = bytes.as_chunks::<4>();
            values.iter_mut().zip(elements).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
        }
        Dtype::Bf16 => {
            let (elements, _) = bytes.as_chunks::<2>();
            values.iter_mut().zip(elements).for_each(|(value, bytes)| *value = from_bf16(u16::from_le_bytes(*bytes)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ties_go_to_even() {
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert_eq!(to_bf16(-f32::from_bits(0x3f81_8000)), 0xbf82);
    }

    #[test]
    fn specials_survive() {
        assert_eq!(from_bf16(to_bf16(f32::INFINITY)), f32::INFINITY);
        assert_eq!(from_bf16(to_bf16(f32::MAX)), f32::INFINITY);
        assert_eq!(to_bf16(-0.0), 0x8000);
        for bits in [0x7f80_0001, 0x7fff_ffff, 0xff80_0001, 0x7fc0_0000] {
            assert!(from_bf16(to_bf16(f32::from_bits(bits))).is_nan(), "{bits:#x}");
        }
    }

    #[test]
    fn decode_appends_whole_elements() {
        let mut values = vec![7.0];
        decode(Dtype::Bf16, &[0x80, 0x3f, 0x01], &mut values);
        assert_eq!(values, [7.0, 1.0]);
    }

    proptest! {
        #[test]
        fn rounding_is_to_the_nearest(x in -1e30f32..1e30) {
            let down = f32::from_bits(x.to_bits() & 0xffff_0000);
            let up = f32::from_bits((x.to_bits() & 0xffff_0000).wrapping_add(0x1_0000));
            let rounded = from_bf16(to_bf16(x));
            let error = (f64::from(rounded) - f64::from(x)).abs();
            prop_assert!(rounded == down || rounded == up);
            prop_assert!(error <= (f64::from(down) - f64::from(x)).abs());
            prop_assert!(error <= (f64::from(up) - f64::from(x)).abs());
        }

        #[test]
        fn bytes_come_back(values in prop::collection::vec(-1e6f32..1e6, 0..50)) {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let mut expected = values.clone();
                round(dtype, &mut expected);
                let bytes = encode(dtype, &values);
                prop_assert_eq!(bytes.len(), values.len() * dtype.size());
                let mut found = vec![f32::NAN; values.len()];
                decode_into(dtype, &bytes, &mut found);
                prop_assert_eq!(found, expected);
            }
        }
    }
}
