//! Buffers on the shim, numbers, and launches under several schedules.

use bytemuck::{Pod, cast_slice};
use conclave_kernels::{
    Dtype, activation,
    cuda::{CudaError, Driver, Shim},
};
use half::bf16;

use crate::driver::{Any, Memory};
pub(crate) use crate::numbers::Numbers;

/// Seeds of the schedules that every launch is run under.
pub(crate) const SEEDS: [u64; 3] = [1, 2, 77];

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
