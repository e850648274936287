//! By AVX2: lookups of half bytes.
#![allow(unsafe_code)]

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
