//! Inputs of tests.

use conclave_kernels::{Dtype, activation};

/// Numbers that look random and are the same on every machine.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 20
    }

    /// One of `0..bound`.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        (self.bits() % u64::from(bound)) as u32
    }

    /// `length` numbers in `-scale..scale`.
    pub(crate) fn vector(&mut self, length: usize, scale: f32) -> Vec<f32> {
        (0..length).map(|_| ((self.bits() >> 4) as f32 / (1u64 << 39) as f32 - 1.0) * scale).collect()
    }

    /// The same, rounded to bf16.
    pub(crate) fn rounded(&mut self, length: usize, scale: f32) -> Vec<f32> {
        let mut values = self.vector(length, scale);
        activation::round(Dtype::Bf16, &mut values);
        values
    }

    /// Different numbers below `bound`, in any order.
    pub(crate) fn distinct(&mut self, count: usize, bound: u32) -> Vec<u32> {
        let mut all: Vec<u32> = (0..bound).collect();
        for at in 0..count {
            all.swap(at, at + self.below(bound - at as u32) as usize);
        }
        all.truncate(count);
        all
    }
}
