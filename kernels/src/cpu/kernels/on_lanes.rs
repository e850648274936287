//! The loops over lanes as the kernels of an instruction set.

use std::marker::PhantomData;

use super::Tiles;
use crate::Dtype;

/// Kernels on lanes of type `L`, beside products of matrices.
pub(super) struct OnLanes<L> {
    pub(super) tiles: fn(Dtype) -> &'static dyn Tiles,
    pub(super) multiply_adds: fn(usize) -> usize,
    lanes: PhantomData<L>,
}

impl<L> OnLanes<L> {
    /// The loops on these lanes beside products, and the [`super::Kernels::multiply_adds`] of the instruction set of those.
    ///
    /// # Safety
    /// Used only where the instruction sets of the lanes and of the products have been found.
    pub(super) const unsafe fn new(tiles: fn(Dtype) -> &'static dyn Tiles, multiply_adds: fn(usize) -> usize) -> Self {
        Self { tiles, multiply_adds, lanes: PhantomData }
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

            fn round(&self, x: &[f32], out: &mut [f32]) {
                compiled!($features, fn(x: &[f32], out: &mut [f32]) { elementwise::round(x, out) })
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

            fn scores(&self, q: &[f32], keys: &[u16], stride: usize, out: Columns<'_>) {
                compiled!($features, fn(q: &[f32], keys: &[u16], stride: usize, out: Columns<'_>) {
                    // SAFETY: see above.
                    unsafe { attention::scores::<$lanes>(q, keys, stride, out) }
                })
            }

            fn softmax(&self, scale: f32, scores: &mut [f32]) -> (f32, f32) {
                compiled!($features, fn(scale: f32, scores: &mut [f32]) -> (f32, f32) {
                    // SAFETY: see above.
                    unsafe { attention::softmax::<$lanes>(scale, scores) }
                })
            }

            fn weigh(&self, weights: Columns<'_>, keys: &[u16], stride: usize, sums: &mut [f32]) {
                compiled!($features, fn(weights: Columns<'_>, keys: &[u16], stride: usize, sums: &mut [f32]) {
                    // SAFETY: see above.
                    unsafe { attention::weigh::<$lanes>(weights, keys, stride, sums) }
                })
            }

            fn multiply_adds(&self, rounds: usize) -> usize {
                (self.multiply_adds)(rounds)
            }
        }
    };
}
