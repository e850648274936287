//! Buffers on the shim, numbers, and launches under several schedules.

use bytemuck::{Pod, cast_slice};
use conclave_kernels::{
    Dtype, activation,
    cuda::{CudaError, Driver, Shim, ShimMemory},
};
use half::bf16;

/// Seeds of the schedules that every launch is run under.
pub(crate) const SEEDS: [u64; 3] = [1, 2, 77];

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

/// A shim that runs one case.
pub(crate) struct Rig {
    pub(crate) shim: Shim,
}

impl Rig {
    /// Memory that holds `values`.
    pub(crate) fn upload<T: Pod>(&self, values: &[T]) -> ShimMemory {
        let memory = self.shim.allocate(size_of_val(values)).unwrap();
        self.shim.upload(&memory, 0, cast_slice(values)).unwrap();
        memory
    }

    /// Memory that holds `values`, rounded to bf16.
    pub(crate) fn upload_bf16(&self, values: &[f32]) -> ShimMemory {
        self.upload(&activation::encode(Dtype::Bf16, values))
    }

    /// Memory of `length` elements that are NaN.
    pub(crate) fn poisoned<T: Pod>(&self, length: usize) -> ShimMemory {
        self.shim.allocate(length * size_of::<T>()).unwrap()
    }

    pub(crate) fn at(&self, memory: &ShimMemory) -> u64 {
        self.shim.address(memory)
    }

    pub(crate) fn download<T: Pod>(&self, memory: &ShimMemory, length: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); length];
        self.shim.download(memory, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }

    pub(crate) fn download_bf16(&self, memory: &ShimMemory, length: usize) -> Vec<f32> {
        self.download::<bf16>(memory, length).into_iter().map(f32::from).collect()
    }
}

/// Runs a case under several schedules, which must give the same bits; gives them.
pub(crate) fn run<T: Pod>(case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>) -> Vec<T> {
    let of = |seed| case(&Rig { shim: Shim::new(seed) }).unwrap();
    let first = of(SEEDS[0]);
    for seed in &SEEDS[1..] {
        assert!(cast_slice::<T, u8>(&of(*seed)) == cast_slice::<T, u8>(&first), "schedule {seed}: other bits");
    }
    first
}

/// Each value within `limit` of the expected one, as a part of `scale`, which it is a sum or product of.
pub(crate) fn assert_close(found: &[f32], expected: &[f64], limit: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= limit * expected.abs().max(1.0), "{what}: at {at} found {found}, expected {expected}");
    }
}
