//! Multiply-adds from registers: the most that an instruction set can do.
// A loop over indices below a const parameter is unrolled, and keeps its sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::hint::black_box;

use super::lanes::{Lanes, MOST};

/// Runs `rounds` rounds of one multiply-add in each of `CHAINS` vectors, and returns how many multiply-adds that were.
/// The chains are independent, and enough of them to hide the latency of one; more would not fit into registers.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn multiply_adds<L: Lanes, const CHAINS: usize>(rounds: usize) -> usize {
    // SAFETY: the contract of this function; `values` has room for each chain.
    unsafe {
        // Opaque, so that nothing is worked out beforehand; the sums tend to 1, far from what is slow to compute.
        let (factor, term) = (L::splat(black_box(0.75)), L::splat(black_box(0.25)));
        let mut sums = [L::splat(0.0); CHAINS];
        for chain in 0..CHAINS {
            sums[chain] = L::splat(black_box(chain as f32));
        }
        for _ in 0..rounds {
            for chain in 0..CHAINS {
                sums[chain] = sums[chain].mul_add(factor, term);
            }
        }
        let mut values = [[0.0f32; MOST]; CHAINS];
        for chain in 0..CHAINS {
            sums[chain].store(values[chain].as_mut_ptr());
        }
        black_box(values);
    }
    rounds * CHAINS * L::COUNT
}
