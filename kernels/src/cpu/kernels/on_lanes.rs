//! The loops over lanes as the kernels of an instruction set.

use std::marker::PhantomData;

use super::{InPlace, Tiles};
use crate::Dtype;

/// Kernels on lanes of type `L`, beside products of matrices.
pub(super) struct OnLanes<L> {
    pub(super) tiles: fn(Dtype) -> &'static dyn Tiles,
    pub(super) multiply_adds: fn(usize) -> usize,
    /// As [`super::Kernels::weights`].
    pub(super) weights: Dtype,
    /// As [`super::Kernels::in_place`].
    pub(super) in_place: Option<&'static dyn InPlace>,
    lanes: PhantomData<L>,
}

impl<L> OnLanes<L> {
    /// The loops on these lanes beside products, and what is of the instruction set of those: [`super::Kernels::multiply_adds`] and
    /// [`super::Kernels::weights`].
    ///
    /// # Safety
    /// Used only where the instruction sets of the lanes and of the products have been found.
    pub(super) const unsafe fn new(
        tiles: fn(Dtype) -> &'static dyn Tiles,
        multiply_adds: fn(usize) -> usize,
        weights: Dtype,
    ) -> Self {
        Self { tiles, multiply_adds, weights, in_place: None, lanes: PhantomData }
    }

    /// The same, with products in place that give the bits of the others.
    pub(super) const fn with_in_place(self, in_place: &'static dyn InPlace) -> Self {
        Self { in_place: Some(in_place), ..self }
    }
}

/// Runs a loop in a function that is compiled for some instruction sets.
macro_rules! compiled {
    ($features:literal, fn($($name:ident: $type:ty),*) $(-> $result:ty)? $body:block) => {{
        #[target_feature(enable = $features)]
        fn compiled($($name: $type),*) $(-> $result)? $body
        // SAFETY: the kernels of an instruction set exist only where it has been found.
        unsafe { compiled($($name),*) }
    }};
}

/// Implements [`super::Kernels`] on lanes, with loops that are compiled for their instruction sets.
// SAFETY (of all calls inside `compiled!`): these run where the lanes are; the loops check the lengths of their slices.
macro_rules! kernels_on_lanes {
    ($lanes:ty, $features:literal) => {
        impl crate::cpu::kernels::Kernels for OnLanes<$lanes> {
            fn tiles(&self, inputs: Dtype) -> &dyn Tiles {
                (self.tiles)(inputs)
            }

            fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
                compiled!($features, fn(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
                    // SAFETY: see above.
                    unsafe { elementwise::rms_norm::<$lanes>(x, gain, eps, out) }
                })
            }

            fn swiglu(&self, gate: &[f32; WIDTH], up: &[f32; WIDTH], out: &mut [f32; WIDTH]) {
                compiled!($features, fn(gate: &[f32; WIDTH], up: &[f32; WIDTH], out: &mut [f32; WIDTH]) {
                    // SAFETY: see above.
                    unsafe { elementwise::swiglu::<$lanes>(gate, up, out) }
                })
            }

            fn weights(&self) -> Dtype {
                self.weights
            }

            fn in_place(&self) -> Option<&dyn InPlace> {
                self.in_place
            }

            fn softmax(&self, scale: f32, scores: &mut [f32]) -> (f32, f32) {
                compiled!($features, fn(scale: f32, scores: &mut [f32]) -> (f32, f32) {
                    // SAFETY: see above.
                    unsafe { softmax::softmax::<$lanes>(scale, scores) }
                })
            }

            fn multiply_adds(&self, rounds: usize) -> usize {
                (self.multiply_adds)(rounds)
            }
        }
    };
}
