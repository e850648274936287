//! Buffers on the shim, numbers, and launches under several schedules.

use bytemuck::{Pod, cast_slice};
use conclave_kernels::{
    Dtype, activation,
    cuda::{CudaError, Driver, Shim},
};
use half::bf16;

use crate::driver::{Any, Memory};

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

/// A driver that runs one case.
pub(crate) struct Rig {
    pub(crate) driver: Any,
}

impl Rig {
    /// On the shim, under the schedule of a seed.
    pub(crate) fn shim(seed: u64) -> Self {
        Self { driver: Any::Shim(Shim::new(seed)) }
    }

    /// Memory that holds `values`.
    pub(crate) fn upload<T: Pod>(&self, values: &[T]) -> Memory {
        let memory = self.driver.allocate(size_of_val(values)).unwrap();
        self.driver.upload(&memory, 0, cast_slice(values)).unwrap();
        memory
    }

    /// Memory that holds `values`, rounded to bf16.
    pub(crate) fn upload_bf16(&self, values: &[f32]) -> Memory {
        self.upload(&activation::encode(Dtype::Bf16, values))
    }

    /// Memory of `length` elements that are NaN.
    pub(crate) fn poisoned<T: Pod>(&self, length: usize) -> Memory {
        self.upload(&vec![0xffu8; length * size_of::<T>()])
    }

    pub(crate) fn at(&self, memory: &Memory) -> u64 {
        self.driver.address(memory)
    }

    pub(crate) fn download<T: Pod>(&self, memory: &Memory, length: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); length];
        self.driver.download(memory, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }

    pub(crate) fn download_bf16(&self, memory: &Memory, length: usize) -> Vec<f32> {
        self.download::<bf16>(memory, length).into_iter().map(f32::from).collect()
    }
}

/// Runs a case on the shim under several schedules, and on a GPU where there is one: all must give the same bits.
pub(crate) fn run<T: Pod>(case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>) -> Vec<T> {
    let first = case(&Rig::shim(SEEDS[0])).unwrap();
    let same = |rig: &Rig, what: &str| {
        assert!(cast_slice::<T, u8>(&case(rig).unwrap()) == cast_slice::<T, u8>(&first), "{what}: other bits");
    };
    for seed in &SEEDS[1..] {
        same(&Rig::shim(*seed), &format!("schedule {seed}"));
    }
    #[cfg(feature = "cuda")]
    if let Some(gpu) = crate::driver::gpu() {
        same(&Rig { driver: Any::Gpu(gpu) }, &gpu.name());
    }
    first
}

/// Each value within `limit` of the expected one, as a part of it, or of 1 if it is smaller.
pub(crate) fn assert_close(found: &[f32], expected: &[f64], limit: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= limit * expected.abs().max(1.0), "{what}: at {at} found {found}, expected {expected}");
    }
}
