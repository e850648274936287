//! The CUDA device: on the shim, and on a GPU where there is one.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use conclave_kernels::{
    Device, Dtype, Pool, Reference,
    cuda::{Cuda, CudaError, Driver, EncodedMap, Launch, Shim, ShimMemory, TensorMap},
};

use crate::{
    agreement::{self, Moves},
    exactness::{BatchSizes, Batches, Chunks, Poison},
    support::{Case, Check, buffer, output},
};

/// Runs a check on the shim, whose schedule is another one each time, and on a GPU.
pub(crate) fn on_cuda(check: &mut impl Check) {
    static SEED: AtomicUsize = AtomicUsize::new(1);
    check.on(&Cuda::new(Shim::new(SEED.fetch_add(1000, Ordering::Relaxed) as u64)));
    #[cfg(feature = "cuda")]
    if let Some(gpu) = gpu() {
        check.on(&Cuda::new(gpu));
    }
}

/// The GPU, or a word that there is none.
#[cfg(feature = "cuda")]
fn gpu() -> Option<conclave_kernels::cuda::Gpu> {
    use std::io::{self, Write};
    match conclave_kernels::cuda::Gpu::new(&Default::default()) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            assert!(std::env::var("REQUIRE_GPU").as_deref() != Ok("1"), "REQUIRE_GPU=1: {error}");
            let _ = writeln!(io::stderr(), "SKIP the CUDA device on a GPU: {error}");
            None
        }
    }
}

struct Near(Case);

impl Check for Near {
    fn on<D: Device>(&mut self, device: &D) {
        assert_eq!(device.activation(), Dtype::Bf16);
        assert!(device.numerics().starts_with("cuda-plain-1-"), "{}", device.numerics());
        let reference = Reference::new(Pool::new(2).unwrap());
        agreement::compare(&agreement::run(device, &self.0), &agreement::run(&reference, &self.0), 8e-3);
    }
}

#[test]
fn cuda_is_near_the_reference() {
    on_cuda(&mut Near(Case::odd()));
}

#[test]
fn values_are_moved_and_added_exactly() {
    on_cuda(&mut Moves);
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    on_cuda(&mut Batches(Case::odd()));
    on_cuda(&mut BatchSizes(Case::odd(), 18));
}

#[test]
fn a_position_does_not_depend_on_how_its_sequence_is_cut() {
    on_cuda(&mut Chunks(Case::odd(), &[1, 65], &[&[1], &[16]]));
    on_cuda(&mut Chunks(Case::odd(), &[530], &[&[300, 211, 16]]));
}

#[test]
fn unused_slots_are_not_read() {
    on_cuda(&mut Poison(Case::odd(), &[(1, 1), (70, 70), (70, 30)]));
}

/// Refuses every launch after some.
struct Failing {
    shim: Shim,
    left: AtomicUsize,
}

impl Driver for Failing {
    type Memory = ShimMemory;
    type Mark = <Shim as Driver>::Mark;

    fn name(&self) -> String {
        "Failing GPU (1)".to_owned()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn allocate(&self, bytes: usize) -> Result<ShimMemory, CudaError> {
        self.shim.allocate(bytes)
    }

    fn zero(&self, memory: &ShimMemory, range: Range<usize>) -> Result<(), CudaError> {
        self.shim.zero(memory, range)
    }

    fn upload(&self, memory: &ShimMemory, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.shim.upload(memory, offset, bytes)
    }

    fn download(&self, memory: &ShimMemory, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.shim.download(memory, offset, bytes)
    }

    fn address(&self, memory: &ShimMemory) -> u64 {
        self.shim.address(memory)
    }

    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        self.shim.tensor_map(map)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        let failed = |_| CudaError::Launch { kernel: launch.kernel.to_owned(), detail: "a bit has flipped".to_owned() };
        left.map_err(failed)?;
        self.shim.launch(launch)
    }

    fn mark(&self) -> Result<Self::Mark, CudaError> {
        self.shim.mark()
    }

    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError> {
        self.shim.seconds(from, to)
    }
}

#[test]
fn a_device_that_has_failed_says_so_whenever_something_is_read() {
    let device = Cuda::new(Failing { shim: Shim::new(1), left: AtomicUsize::new(1) });
    assert_eq!(device.numerics(), "cuda-plain-1-failing-gpu-1");
    let (two, three) = (buffer(&device, &[2.0; 4]), buffer(&device, &[3.0; 4]));
    let sum = output(&device, 4, |out| {
        *out = buffer(&device, &[1.0; 4]);
        device.add(out, &two);
    });
    assert_eq!(sum, [3.0; 4]);
    let mut x = buffer(&device, &[1.0; 4]);
    device.add(&mut x, &two);
    device.add_two(&mut x, &two, &three);
    device.gather(&three, 2, &[0], &mut x);
    let mut values = Vec::new();
    let message = "the device has failed: kernel add: a bit has flipped";
    assert_eq!(device.encode(&x).unwrap_err().to_string(), message);
    assert_eq!(device.read(&mut x, &mut values).unwrap_err().to_string(), message);
    assert_eq!(device.grouped_ffn(&[], &[], &mut []).unwrap_err().to_string(), message);
}
