//! Weights in E4M3, brought to bf16 for tiles: every value of the one is a value of the other, also in [`UNITS`].
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vbmi;

#[cfg(target_arch = "x86_64")]
pub(super) use vbmi::Lookups;

use crate::weight::E4M3;

/// A byte that is not a number; so is the same with a sign.
pub(crate) const NAN: u8 = 0x7f;

/// Values are in units of this part of one: so an E4M3 is the f16 with its bits in place, with a fourth bit before its exponent.
pub(crate) const UNITS: f32 = 256.0;

/// The bf16 of every byte, in [`UNITS`].
const BF16: [u16; 256] = {
    let mut all = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        // Exact: a bf16 has four more bits of mantissa, and exponents to spare.
        all[byte] = ((E4M3[byte] / UNITS).to_bits() >> 16) as u16;
        byte += 1;
    }
    all
};

/// Writes the values of bytes, in [`UNITS`], none of which is [`NAN`], and asks for the bytes `ahead` of each.
pub(crate) fn widen(from: &[u8], ahead: usize, to: &mut [u16]) {
    let done = in_vectors(from, ahead, to);
    one_by_one(&from[done..], &mut to[done..]);
}

/// As many bytes as fill the widest vectors of this processor; how many that were.
#[cfg(target_arch = "x86_64")]
fn in_vectors(from: &[u8], ahead: usize, to: &mut [u16]) -> usize {
    if Lookups::are_available() {
        // SAFETY: AVX-512 BW and VBMI have been found.
        unsafe { vbmi::widen(from.as_chunks().0, ahead, to.as_chunks_mut().0) }
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 has been found.
        unsafe { avx2::widen(from.as_chunks().0, ahead, to.as_chunks_mut().0) }
    } else {
        0
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn in_vectors(_: &[u8], _: usize, _: &mut [u16]) -> usize {
    0
}

fn one_by_one(from: &[u8], to: &mut [u16]) {
    to.iter_mut().zip(from).for_each(|(to, byte)| *to = BF16[*byte as usize]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::from_bf16;

    /// The value of a byte, by definition.
    fn value(byte: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
        let size = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2.0f32.powi(exponent - 7) };
        if byte >> 7 == 1 { -size } else { size }
    }

    fn check(bytes: &[u8], found: &[u16]) {
        for (byte, found) in bytes.iter().zip(found) {
            assert_eq!((from_bf16(*found) * UNITS).to_bits(), value(*byte).to_bits(), "{byte:#x}");
        }
    }

    #[test]
    fn every_byte_has_its_value_wherever_it_lies() {
        for skew in 0..40u8 {
            let bytes: Vec<u8> = (0..=255u8).map(|byte| byte.wrapping_mul(93).wrapping_add(skew)).collect();
            let bytes: Vec<u8> = bytes.into_iter().filter(|byte| byte & 0x7f != NAN).chain([skew; 9]).collect();
            let mut found = vec![0; bytes.len()];
            widen(&bytes, 64, &mut found);
            check(&bytes, &found);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                found.fill(0);
                // SAFETY: AVX2 has been found.
                let done = unsafe { avx2::widen(bytes.as_chunks().0, 64, found.as_chunks_mut().0) };
                assert!(done + avx2::BYTES > bytes.len());
                check(&bytes[..done], &found);
            }
        }
    }
}
