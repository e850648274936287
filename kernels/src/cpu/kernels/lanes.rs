//! Lanes of f32: the vector type that the loops are written over.
#![allow(unsafe_code)]

/// Lanes of a vector at most.
pub(super) const MOST: usize = 16;

/// Some f32 side by side.
///
/// # Safety
/// All functions require that the machine has the instruction set of the type; those that take a pointer require
/// that as many elements (or pairs) as there are lanes may be read or written there, at any alignment. Every caller must be
/// compiled for the instruction set, or be inlined into a function that is.
pub(super) trait Lanes: Copy {
    /// How many: a power of two, at most [`MOST`]. Part of the instruction set's numerics.
    const COUNT: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// The first of each pair of bf16, widened; a pair for each lane.
    unsafe fn load_first(from: *const u16) -> Self;
    /// The second of each pair of bf16, widened.
    unsafe fn load_second(from: *const u16) -> Self;
    /// Asks for what lies at an address, which need not be valid, without waiting for it.
    unsafe fn prefetch(from: *const u16);
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self · factor + term`; whether it is rounded once or twice is part of the instruction set's numerics.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The larger one; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller one; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// To the nearest integer.
    unsafe fn nearest(self) -> Self;
    /// `2^n` for integral lanes in `-126..=127`.
    unsafe fn exp2_integral(self) -> Self;

    /// The sum of all lanes, pairwise: the second half is added to the first, and so on; `((0 + 4) + (2 + 6)) + ((1 + 5) +
    /// (3 + 7))` of eight.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0.0f32; MOST];
        // SAFETY: the array has enough elements; the rest is the contract of the trait.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut count = Self::COUNT;
        while count > 1 {
            count /= 2;
            for lane in 0..count {
                lanes[lane] += lanes[lane + count];
            }
        }
        lanes[0]
    }
}
