//! The loops for x86-64 with AVX-512: sixteen lanes, and dot products of bf16 pairs for the products of matrices.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    InPlace, Kernels, Strip, Tiles,
    avx2::{self, Ymm},
    dots::{self, Dots},
    elementwise,
    lanes::Lanes,
    on_lanes::OnLanes,
    softmax,
    tile::{self, InBf16},
};
use crate::{Dtype, panels::WIDTH};

/// Whether this machine has what the loops are compiled for.
pub(super) fn is_available() -> bool {
    avx2::is_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// The loops for AVX-512 with BF16.
///
/// # Panics
/// When the machine lacks either.
pub(super) fn kernels() -> &'static dyn Kernels {
    // SAFETY: handed out below, where AVX-512 with BF16 has been found.
    static KERNELS: OnLanes<Zmm> =
        unsafe { OnLanes::new(tiles, dots::multiply_adds, Dtype::Bf16) }.with_in_place(&Dots);
    assert!(is_available(), "AVX-512 with BF16");
    &KERNELS
}

fn tiles(inputs: Dtype) -> &'static dyn Tiles {
    match inputs {
        Dtype::Bf16 => &Dots,
        Dtype::F32 => &MultiplyAdds,
    }
}

/// Products of f32 inputs, for machines that have AVX-512.
pub(super) struct MultiplyAdds;

impl Tiles for MultiplyAdds {
    fn pack(&self, rows: &[&[f32]], strip: usize, to: &mut [f32]) {
        tile::pack(Dtype::F32, rows, strip, to);
    }

    fn tile(&self, x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
        compiled!("avx512f", fn(x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
            // SAFETY: compiled for AVX-512; the loop checks the lengths of its slices.
            unsafe { tile::tile::<Zmm, InBf16, 1>(x, strip, sums) }
        });
    }
}

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(super) struct Zmm(__m512);

// SAFETY (of all calls below): the caller vouches for AVX-512 and sixteen elements behind a pointer.
impl Lanes for Zmm {
    const COUNT: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_first(from: *const u16) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_second(from: *const u16) -> Self {
        // SAFETY: see above.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            Self(_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from.cast()), high)))
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
        unsafe { _mm512_storeu_ps(to, self.0) };
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            Ymm(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper)).sum()
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    unsafe fn exp2_integral(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        }
    }
}

kernels_on_lanes!(Zmm, "avx512f");
