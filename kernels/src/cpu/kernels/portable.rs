//! The loops in plain Rust, for any machine: products are rounded before they are added.
#![allow(unsafe_code)]

use super::{InPlace, Kernels, Strip, Tiles, elementwise, lanes::Lanes, peak, softmax, tile};
use crate::{Dtype, activation, panels::WIDTH};

/// Kernels of [`crate::Isa::Portable`].
pub(super) struct Portable;

#[derive(Clone, Copy)]
struct Array([f32; 8]);

impl Array {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self.0;
        out.iter_mut().zip(other.0).for_each(|(out, other)| *out = f(*out, other));
        Self(out)
    }
}

impl Lanes for Array {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for eight elements.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_first(from: *const u16) -> Self {
        // SAFETY: the caller vouches for eight pairs.
        Self(unsafe { from.cast::<[[u16; 2]; 8]>().read_unaligned() }.map(|[first, _]| activation::from_bf16(first)))
    }

    #[inline(always)]
    unsafe fn load_second(from: *const u16) -> Self {
        // SAFETY: the caller vouches for eight pairs.
        Self(unsafe { from.cast::<[[u16; 2]; 8]>().read_unaligned() }.map(|[_, second]| activation::from_bf16(second)))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u16) {}

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for eight elements.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        self.zip(factor, |a, b| a * b).zip(term, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // Adding and taking away 1.5 · 2^23 leaves no room for a fraction; lanes are far smaller here.
        const SHIFT: f32 = 12_582_912.0;
        self.zip(self, |a, _| (a + SHIFT) - SHIFT)
    }

    #[inline(always)]
    unsafe fn exp2_integral(self) -> Self {
        self.zip(self, |a, _| f32::from_bits(((a as i32 + 127) << 23) as u32))
    }
}

/// Products of inputs rounded to a type.
struct PortableTiles(Dtype);

impl Tiles for PortableTiles {
    fn pack(&self, rows: &[&[f32]], strip: usize, to: &mut [f32]) {
        tile::pack(self.0, rows, strip, to);
    }

    fn tile(&self, x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
        // SAFETY: plain Rust needs no instruction set; the loop checks the lengths of its slices.
        unsafe { tile::tile::<Array, tile::InBf16, 2>(x, strip, sums) }
    }
}

// SAFETY (of all calls below): plain Rust needs no instruction set; the loops check the lengths of their slices.
impl Kernels for Portable {
    fn tiles(&self, inputs: Dtype) -> &dyn Tiles {
        match inputs {
            Dtype::Bf16 => &PortableTiles(Dtype::Bf16),
            Dtype::F32 => &PortableTiles(Dtype::F32),
        }
    }

    fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: see above.
        unsafe { elementwise::rms_norm::<Array>(x, gain, eps, out) }
    }

    fn swiglu(&self, gate: &[f32; WIDTH], up: &[f32; WIDTH], out: &mut [f32; WIDTH]) {
        // SAFETY: see above.
        unsafe { elementwise::swiglu::<Array>(gate, up, out) }
    }

    fn weights(&self) -> Dtype {
        Dtype::F32
    }

    fn in_place(&self) -> Option<&dyn InPlace> {
        None
    }

    fn softmax(&self, scale: f32, scores: &mut [f32]) -> (f32, f32) {
        // SAFETY: see above.
        unsafe { softmax::softmax::<Array>(scale, scores) }
    }

    fn multiply_adds(&self, rounds: usize) -> usize {
        // SAFETY: see above.
        unsafe { peak::multiply_adds::<Array, 6>(rounds) }
    }
}
