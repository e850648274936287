//! The loops for x86-64 with AVX2 and FMA: sums of products are rounded once a step.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Kernels, Tiles, elementwise, lanes::Lanes, on_lanes::OnLanes, peak, softmax, tile};
use crate::{Dtype, panels::WIDTH};

/// Products of inputs rounded to a type; got only from [`kernels`].
struct Avx2Tiles(Dtype);

/// Whether this machine has what the loops are compiled for.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// The loops for AVX2 and FMA.
///
/// # Panics
/// When the machine lacks either.
pub(super) fn kernels() -> &'static dyn Kernels {
    // SAFETY: handed out below, where AVX2 and FMA have been found.
    static KERNELS: OnLanes<Ymm> = unsafe { OnLanes::new(tiles, multiply_adds, Dtype::F32) };
    assert!(is_available(), "AVX2 and FMA");
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

// SAFETY (of all calls inside `compiled!`): these run with AVX2 and FMA; the loops check the lengths of their slices.
impl Tiles for Avx2Tiles {
    fn pack(&self, rows: &[&[f32]], to: &mut [f32]) {
        let inputs = self.0;
        compiled!("avx2,fma", fn(inputs: Dtype, rows: &[&[f32]], to: &mut [f32]) { tile::pack(inputs, rows, to) })
    }

    fn tile(&self, x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
        compiled!("avx2,fma", fn(x: &[f32], panels: &[&[u16]], sums: &mut [[f32; WIDTH]]) {
            // SAFETY: see above.
            unsafe { tile::tile::<Ymm, 2>(x, panels, sums) }
        })
    }
}

kernels_on_lanes!(Ymm, "avx2,fma");
