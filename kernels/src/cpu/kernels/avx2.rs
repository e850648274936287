//! The loops for x86-64 with AVX2, FMA and F16C: sums of products are rounded once a step.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    InPlace, Kernels, Strip, Tiles, elementwise,
    lanes::Lanes,
    on_lanes::OnLanes,
    peak, softmax,
    tile::{self, InBf16, Weights},
};
use crate::{Dtype, panels::WIDTH};

/// Up to so many rows, bytes that go to f32 each time that they are read are faster than those that are brought to bf16 once.
const BYTES_ROWS: usize = 4;

/// Products of inputs rounded to a type; got only from [`kernels`].
struct Avx2Tiles(Dtype);

/// Whether this machine has what the loops are compiled for: processors with AVX2 have the rest, too.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The loops for AVX2, FMA and F16C.
///
/// # Panics
/// When the machine lacks either.
pub(super) fn kernels() -> &'static dyn Kernels {
    // SAFETY: handed out below, where AVX2, FMA and F16C have been found.
    static KERNELS: OnLanes<Ymm> = unsafe { OnLanes::new(tiles, multiply_adds, Dtype::F32) };
    assert!(is_available(), "AVX2, FMA and F16C");
    &KERNELS
}

fn tiles(inputs: Dtype) -> &'static dyn Tiles {
    match inputs {
        Dtype::Bf16 => &Avx2Tiles(Dtype::Bf16),
        Dtype::F32 => &Avx2Tiles(Dtype::F32),
    }
}

fn multiply_adds(rounds: usize) -> usize {
    compiled!("avx2,fma", fn(rounds: usize) -> usize {
        // SAFETY: compiled for AVX2 and FMA.
        unsafe { peak::multiply_adds::<Ymm, 12>(rounds) }
    })
}

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Ymm(pub(super) __m256);

// SAFETY (of all calls below): the caller vouches for AVX2, FMA and eight elements behind a pointer.
impl Lanes for Ymm {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_first(from: *const u16) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_second(from: *const u16) -> Self {
        // SAFETY: see above.
        unsafe {
            let pairs = _mm256_loadu_si256(from.cast());
            Self(_mm256_castsi256_ps(_mm256_blend_epi16::<0xaa>(_mm256_setzero_si256(), pairs)))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u16) {
        // SAFETY: a prefetch of an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, self.0) };
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, term.0) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    unsafe fn exp2_integral(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
}

/// Weights in E4M3: with the bits in the place of those of an f16, a byte has its value in [`super::e4m3::UNITS`], in full even
/// below the least normal number.
struct InE4m3;

impl Weights<Ymm, 2> for InE4m3 {
    type Element = u8;

    #[inline(always)]
    unsafe fn load<const SECOND: bool>(from: *const u8) -> [Ymm; 2] {
        // SAFETY: the caller's, for 32 bytes, and F16C.
        unsafe {
            let pairs = _mm256_loadu_si256(from.cast());
            let upper = if SECOND { pairs } else { _mm256_slli_epi16::<8>(pairs) };
            let all = _mm256_and_si256(_mm256_srai_epi16::<1>(upper), _mm256_set1_epi16(0xbf80_u16 as i16));
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(all));
            [Ymm(low), Ymm(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(all)))]
        }
    }
}

// SAFETY (of all calls inside `compiled!`): these run with AVX2, FMA and F16C; the loops check the lengths of their slices.
impl Tiles for Avx2Tiles {
    fn pack(&self, rows: &[&[f32]], strip: usize, to: &mut [f32]) {
        let inputs = self.0;
        compiled!("avx2,fma", fn(inputs: Dtype, rows: &[&[f32]], strip: usize, to: &mut [f32]) {
            tile::pack(inputs, rows, strip, to)
        })
    }

    fn tile(&self, x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
        compiled!("avx2,fma", fn(x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
            // SAFETY: see above.
            unsafe { tile::tile::<Ymm, InBf16, 2>(x, strip, sums) }
        })
    }

    fn takes_bytes(&self, rows: usize) -> bool {
        rows <= BYTES_ROWS
    }

    fn tile_bytes(&self, x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]]) {
        compiled!("avx2,fma,f16c", fn(x: &[f32], strip: Strip<'_, u8>, sums: &mut [[f32; WIDTH]]) {
            // SAFETY: see above.
            unsafe { tile::tile::<Ymm, InE4m3, 2>(x, strip, sums) }
        })
    }
}

kernels_on_lanes!(Ymm, "avx2,fma");
