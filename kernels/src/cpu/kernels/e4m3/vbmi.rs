//! By AVX-512 VBMI: lookups of bytes.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::BF16;

/// The bytes of a bf16 by the byte without its sign: AVX-512 VBMI looks 64 of them up in 128 at once.
pub(in crate::cpu::kernels) struct Lookups {
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

/// Lower halves of the bf16 of all bytes without a sign.
const LOW: [u8; 128] = bytes(0);
/// Upper halves.
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
    pub(in crate::cpu::kernels) fn are_available() -> bool {
        is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi")
    }

    /// # Safety
    /// AVX-512 BW and VBMI.
    #[inline(always)]
    pub(in crate::cpu::kernels) unsafe fn new() -> Self {
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
    pub(in crate::cpu::kernels) unsafe fn widen(&self, from: *const u8) -> [__m512i; 2] {
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
