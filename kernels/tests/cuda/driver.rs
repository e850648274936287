//! The shim or a GPU, so that one test serves both.

use std::ops::Range;

use conclave_kernels::cuda::{CudaError, Driver, EncodedMap, Launch, Shim, ShimMemory, TensorMap};
#[cfg(feature = "cuda")]
use conclave_kernels::cuda::{Gpu, GpuMemory};

/// What runs a test's kernels.
pub(crate) enum Any {
    Shim(Shim),
    #[cfg(feature = "cuda")]
    Gpu(&'static Gpu),
}

/// Its memory.
pub(crate) enum Memory {
    Shim(ShimMemory),
    #[cfg(feature = "cuda")]
    Gpu(GpuMemory),
}

/// A mark of it.
pub(crate) enum Mark {
    Shim(<Shim as Driver>::Mark),
    #[cfg(feature = "cuda")]
    Gpu(<Gpu as Driver>::Mark),
}

/// A copy of it to the host.
pub(crate) enum Copy {
    Shim(<Shim as Driver>::Copy),
    #[cfg(feature = "cuda")]
    Gpu(<Gpu as Driver>::Copy),
}

/// Calls the same method of whichever driver there is, with its own memory.
macro_rules! each {
    ($any:expr, $driver:ident => $call:expr) => {
        match $any {
            Any::Shim($driver) => $call,
            #[cfg(feature = "cuda")]
            Any::Gpu($driver) => $call,
        }
    };
    ($any:expr, $memory:expr, ($driver:ident, $own:ident) => $call:expr) => {
        match ($any, $memory) {
            (Any::Shim($driver), Memory::Shim($own)) => $call,
            #[cfg(feature = "cuda")]
            (Any::Gpu($driver), Memory::Gpu($own)) => $call,
            #[cfg(feature = "cuda")]
            _ => panic!("memory of another driver"),
        }
    };
}

impl Driver for Any {
    type Memory = Memory;
    type Mark = Mark;
    type Copy = Copy;

    fn name(&self) -> String {
        each!(self, driver => driver.name())
    }

    fn chip(&self) -> &'static str {
        each!(self, driver => driver.chip())
    }

    fn multiprocessors(&self) -> usize {
        each!(self, driver => driver.multiprocessors())
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, CudaError> {
        match self {
            Self::Shim(shim) => shim.allocate(bytes).map(Memory::Shim),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.allocate(bytes).map(Memory::Gpu),
        }
    }

    fn zero(&self, memory: &Memory, range: Range<usize>) -> Result<(), CudaError> {
        each!(self, memory, (driver, own) => driver.zero(own, range))
    }

    fn upload_parts(&self, memory: &Memory, offset: usize, parts: &[&[u8]]) -> Result<(), CudaError> {
        each!(self, memory, (driver, own) => driver.upload_parts(own, offset, parts))
    }

    fn fetch(&self, parts: &[(&Memory, Range<usize>)]) -> Result<Copy, CudaError> {
        let [(memory, range)] = parts else { panic!("one part at a time") };
        match (self, memory) {
            (Self::Shim(shim), Memory::Shim(own)) => shim.fetch(&[(own, range.clone())]).map(Copy::Shim),
            #[cfg(feature = "cuda")]
            (Self::Gpu(gpu), Memory::Gpu(own)) => gpu.fetch(&[(own, range.clone())]).map(Copy::Gpu),
            #[cfg(feature = "cuda")]
            _ => panic!("memory of another driver"),
        }
    }

    fn take(&self, copy: Copy, parts: &mut [&mut [u8]]) -> Result<(), CudaError> {
        match (self, copy) {
            (Self::Shim(shim), Copy::Shim(copy)) => shim.take(copy, parts),
            #[cfg(feature = "cuda")]
            (Self::Gpu(gpu), Copy::Gpu(copy)) => gpu.take(copy, parts),
            #[cfg(feature = "cuda")]
            _ => panic!("a copy of another driver"),
        }
    }

    fn address(&self, memory: &Memory) -> u64 {
        each!(self, memory, (driver, own) => driver.address(own))
    }

    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        each!(self, driver => driver.tensor_map(map))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        each!(self, driver => driver.launch(launch))
    }

    fn mark(&self) -> Result<Mark, CudaError> {
        match self {
            Self::Shim(shim) => shim.mark().map(Mark::Shim),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.mark().map(Mark::Gpu),
        }
    }

    fn seconds(&self, from: &Mark, to: &Mark) -> Result<f64, CudaError> {
        match (self, from, to) {
            (Self::Shim(shim), Mark::Shim(from), Mark::Shim(to)) => shim.seconds(from, to),
            #[cfg(feature = "cuda")]
            (Self::Gpu(gpu), Mark::Gpu(from), Mark::Gpu(to)) => gpu.seconds(from, to),
            #[cfg(feature = "cuda")]
            _ => panic!("marks of another driver"),
        }
    }
}

/// The GPU of this machine, opened once. Says once why there is none, which fails under `REQUIRE_GPU=1`.
#[cfg(feature = "cuda")]
pub(crate) fn gpu() -> Option<&'static Gpu> {
    use std::{
        io::{self, Write},
        sync::OnceLock,
    };

    use conclave_kernels::cuda::GpuOptions;

    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let open = || match Gpu::new(&GpuOptions::default()) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            // Not by `println`, which the test harness shows of failing tests only.
            let _ = writeln!(io::stderr(), "SKIP kernels on a GPU: {error}");
            None
        }
    };
    let gpu = GPU.get_or_init(open).as_ref();
    assert!(gpu.is_some() || std::env::var("REQUIRE_GPU").as_deref() != Ok("1"), "REQUIRE_GPU=1, and no GPU");
    gpu
}
