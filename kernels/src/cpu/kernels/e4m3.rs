//! Weights in E4M3, brought to bf16 for tiles: every value of the one is a value of the other, also in [`UNITS`].
#![allow(unsafe_code)]

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
    #[cfg(target_arch = "x86_64")]
    let (from, to) = {
        let done = if Lookups::are_available() {
            // SAFETY: AVX-512 BW and VBMI have been found.
            unsafe { vbmi::widen(from.as_chunks().0, ahead, to.as_chunks_mut().0) }
        } else if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 has been found.
            unsafe { avx2::widen(from.as_chunks().0, ahead, to.as_chunks_mut().0) }
        } else {
            0
        };
        (&from[done..], &mut to[done..])
    };
    let _ = ahead;
    one_by_one(from, to);
}

fn one_by_one(from: &[u8], to: &mut [u16]) {
    to.iter_mut().zip(from).for_each(|(to, byte)| *to = BF16[*byte as usize]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::BF16;

    /// Bytes that are widened together.
    pub(super) const BYTES: usize = 32;

    type Table = [u8; 16];

    /// Lower half of the bf16 by lower half of the byte, and upper by upper: normal numbers.
    const NORMAL: [Table; 2] = halves(0x10, 0x08);
    /// Both by lower half of the byte: numbers below the normal ones, without their sign.
    const SMALL: [Table; 2] = halves(0, 0);

    /// Lower halves of the bf16 of bytes `high | n`, and upper ones of bytes `n << 4 | low`; for those below the normal ones both
    /// are of bytes `n`.
    const fn halves(high: u8, low: u8) -> [Table; 2] {
        let mut tables = [[0; 16]; 2];
        let mut n = 0;
        while n < 16 {
            let upper = if low == 0 { n } else { n << 4 | low };
            tables[0][n as usize] = BF16[(high | n) as usize] as u8;
            tables[1][n as usize] = (BF16[upper as usize] >> 8) as u8;
            n += 1;
        }
        tables
    }

    /// How many bytes that were.
    #[target_feature(enable = "avx2")]
    pub(super) fn widen(from: &[[u8; BYTES]], ahead: usize, to: &mut [[u16; BYTES]]) -> usize {
        let table = |table: &Table| {
            // SAFETY: sixteen bytes.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
        };
        let ([low_normal, high_normal], [low_small, high_small]) =
            (NORMAL.each_ref().map(table), SMALL.each_ref().map(table));
        let (half, exponent, sign) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi8(0x78), _mm256_set1_epi8(-0x80));
        for (from, to) in from.iter().zip(to) {
            // SAFETY: as many bytes; a prefetch reads nothing, wherever it points.
            let bytes = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(ahead).cast());
                _mm256_loadu_si256(from.as_ptr().cast())
            };
            // The second and the third quarter change places, as what is interleaved below stays in its half of the register.
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(bytes);
            let index = _mm256_and_si256(bytes, half);
            let mut low = _mm256_shuffle_epi8(low_normal, index);
            let mut high = _mm256_shuffle_epi8(high_normal, _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), half));
            let small = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, exponent), _mm256_setzero_si256());
            if _mm256_testz_si256(small, small) == 0 {
                let signed = _mm256_or_si256(_mm256_shuffle_epi8(high_small, index), _mm256_and_si256(bytes, sign));
                low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(low_small, index), small);
                high = _mm256_blendv_epi8(high, signed, small);
            }
            let to = to.as_mut_ptr().cast::<__m256i>();
            // SAFETY: room for 32 values.
            unsafe {
                _mm256_storeu_si256(to, _mm256_unpacklo_epi8(low, high));
                _mm256_storeu_si256(to.add(1), _mm256_unpackhi_epi8(low, high));
            }
        }
        from.len() * BYTES
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use vbmi::Lookups;

#[cfg(target_arch = "x86_64")]
mod vbmi {
    use std::arch::x86_64::*;

    use super::BF16;

    /// The bytes of a bf16 by the byte without its sign: AVX-512 VBMI looks 64 of them up in 128 at once.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Lookups {
        low: [__m512i; 2],
        high: [__m512i; 2],
        quarters: __m512i,
        sign: __m512i,
    }

    /// Bytes that are widened together.
    const BYTES: usize = 64;

    /// How many bytes that were.
    #[target_feature(enable = "avx512bw,avx512vbmi")]
    pub(super) fn widen(from: &[[u8; BYTES]], ahead: usize, to: &mut [[u16; BYTES]]) -> usize {
        // SAFETY: compiled for what they need.
        let lookups = unsafe { Lookups::new() };
        for (from, to) in from.iter().zip(to) {
            // SAFETY: as many bytes, and room for their values; a prefetch reads nothing, wherever it points.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(ahead).cast());
                let [first, second] = lookups.widen(from.as_ptr());
                _mm512_storeu_si512(to.as_mut_ptr().cast(), first);
                _mm512_storeu_si512(to[BYTES / 2..].as_mut_ptr().cast(), second);
            }
        }
        from.len() * BYTES
    }

    const LOW: [u8; 128] = bytes(0);
    const HIGH: [u8; 128] = bytes(8);

    const fn bytes(shift: u32) -> [u8; 128] {
        let mut all = [0; 128];
        let mut byte = 0;
        while byte < 128 {
            all[byte] = (BF16[byte] >> shift) as u8;
            byte += 1;
        }
        all
    }

    impl Lookups {
        /// Whether this processor has what they are compiled for.
        pub(in super::super) fn are_available() -> bool {
            is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi")
        }

        /// # Safety
        /// AVX-512 BW and VBMI.
        #[inline(always)]
        pub(in super::super) unsafe fn new() -> Self {
            // SAFETY: the caller's; 128 bytes each.
            unsafe {
                let table = |bytes: &[u8; 128]| {
                    [_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bytes[64..].as_ptr().cast())]
                };
                Self {
                    low: table(&LOW),
                    high: table(&HIGH),
                    quarters: _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                    sign: _mm512_set1_epi8(-0x80),
                }
            }
        }

        /// The values of 64 bytes, in [`super::UNITS`].
        ///
        /// # Safety
        /// AVX-512 BW and VBMI; 64 bytes, none of which is [`super::NAN`].
        #[inline(always)]
        pub(in super::super) unsafe fn widen(&self, from: *const u8) -> [__m512i; 2] {
            /// `a | b & c`
            const OR_AND: i32 = 0b1111_1000;
            // SAFETY: the caller's.
            unsafe {
                // What is interleaved below stays in its quarter of the register.
                let bytes = _mm512_permutexvar_epi64(self.quarters, _mm512_loadu_si512(from.cast()));
                let low = _mm512_permutex2var_epi8(self.low[0], bytes, self.low[1]);
                let high = _mm512_permutex2var_epi8(self.high[0], bytes, self.high[1]);
                let high = _mm512_ternarylogic_epi64::<OR_AND>(high, bytes, self.sign);
                [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
            }
        }
    }
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

    #[test]
    fn every_byte_has_its_value_wherever_it_lies() {
        for skew in 0..40u8 {
            let bytes: Vec<u8> = (0..=255u8).map(|byte| byte.wrapping_mul(93).wrapping_add(skew)).collect();
            let bytes: Vec<u8> = bytes.into_iter().filter(|byte| byte & 0x7f != NAN).chain([skew; 9]).collect();
            let mut found = vec![0; bytes.len()];
            widen(&bytes, 64, &mut found);
            for (byte, found) in bytes.iter().zip(found) {
                assert_eq!((from_bf16(found) * UNITS).to_bits(), value(*byte).to_bits(), "{byte:#x}");
            }
        }
    }
}
