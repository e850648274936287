//! What computes.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
#[cfg(feature = "cuda")]
use conclave_kernels::cuda::{Cuda, CudaError, CudaRates, Gpu, GpuOptions, Graphs};
use conclave_kernels::{Cpu, CpuRates, Fp8Weights, Isa, Pool, RateProbe, Reference};

#[cfg(not(feature = "cuda"))]
const WITHOUT_CUDA: &str =
    "--device cuda: this binary was built without the feature cuda (build it with --features cuda)";

/// Graphs of a GPU at most: two a layer and micro-batch, of some kinds each.
#[cfg(feature = "cuda")]
const GRAPHS: usize = 4096;

/// Kinds of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The plain definitions, in f32: slow, for comparison.
    Reference,
    /// Fast kernels for this machine's processor, in bf16.
    Cpu,
    /// One NVIDIA GPU, in bf16; needs a build with the feature cuda, the driver's libcuda and the GPU.
    Cuda,
}

impl DeviceKind {
    /// What becomes of weights in FP8 on such a device.
    pub fn fp8_weights(self) -> Fp8Weights {
        match self {
            Self::Reference => Fp8Weights::Widened,
            Self::Cpu => Fp8Weights::Kept,
            Self::Cuda => Fp8Weights::Multiplied,
        }
    }
}

/// What computes, and on how many threads.
#[derive(Debug, Clone, Args)]
pub struct DeviceArgs {
    /// What computes.
    #[arg(long, env = "CONCLAVE_DEVICE", value_enum, default_value = "cpu")]
    pub device: DeviceKind,
    /// Threads that compute [default: one per core].
    #[arg(long, env = "CONCLAVE_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Instruction set of the cpu device [default: the best that this machine has].
    #[arg(long, env = "CONCLAVE_ISA", value_name = "amx|avx512|avx2|portable")]
    pub isa: Option<Isa>,
    /// Directory of kernels that take the place of those built in, by file name (cuda device).
    #[arg(long, env = "KERNEL_DIR", value_name = "DIR")]
    pub kernel_dir: Option<PathBuf>,
    /// Launch kernels one by one, not as graphs of what lies between two dispatch points (cuda device).
    #[arg(long, env = "CONCLAVE_NO_GRAPHS")]
    pub no_graphs: bool,
}

/// A device that is there.
#[derive(Clone)]
pub enum AnyDevice {
    /// See [`DeviceKind::Reference`].
    Reference(Arc<Reference>),
    /// See [`DeviceKind::Cpu`].
    Cpu(Arc<Cpu>),
    /// See [`DeviceKind::Cuda`].
    #[cfg(feature = "cuda")]
    Cuda(Arc<Cuda<Graphs<Gpu>>>),
}

/// Evaluates an expression with the device of whichever kind it is.
macro_rules! on_device {
    ($any:expr, $device:ident => $call:expr) => {
        match $any {
            $crate::process::device::AnyDevice::Reference($device) => $call,
            $crate::process::device::AnyDevice::Cpu($device) => $call,
            #[cfg(feature = "cuda")]
            $crate::process::device::AnyDevice::Cuda($device) => $call,
        }
    };
}
pub(crate) use on_device;

impl DeviceArgs {
    /// Makes the device and its threads.
    ///
    /// # Errors
    /// When the machine lacks the instruction set or the GPU, or gives no threads; when the directory of kernels is none, or
    /// holds none for the GPU.
    pub fn open(&self) -> Result<AnyDevice> {
        self.check_kernel_dir()?;
        let pool = || Ok::<_, anyhow::Error>(Pool::new(self.count()?)?);
        Ok(match self.device {
            DeviceKind::Reference => AnyDevice::Reference(Arc::new(Reference::new(pool()?))),
            DeviceKind::Cpu => AnyDevice::Cpu(Arc::new(Cpu::new(pool()?, self.isa).context("--isa")?)),
            DeviceKind::Cuda => self.cuda()?,
        })
    }

    /// What measures the most that the device's hardware can do. The reference device has the loops of any processor.
    ///
    /// # Errors
    /// As [`Self::open`], or when there is no memory.
    pub fn rates(&self) -> Result<Box<dyn RateProbe>> {
        let isa = match self.device {
            DeviceKind::Reference => Isa::Portable,
            DeviceKind::Cpu => self.isa.unwrap_or(Isa::available()[0]),
            DeviceKind::Cuda => return self.cuda_rates(),
        };
        Ok(Box::new(CpuRates::new(Pool::new(self.count()?)?, isa, CpuRates::BYTES)?))
    }

    /// How many threads compute.
    ///
    /// # Errors
    /// When the number makes no sense.
    pub fn count(&self) -> Result<usize> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.unwrap_or(cores);
        if !(1..=1024).contains(&threads) {
            bail!("--threads: found {threads}, expected 1 to 1024");
        }
        Ok(threads)
    }

    /// A path that leads nowhere is a mistake whatever computes; which files there must be, only the GPU's chip says.
    fn check_kernel_dir(&self) -> Result<()> {
        let Some(directory) = &self.kernel_dir else { return Ok(()) };
        let expected = "expected a directory of kernels, such as linear.sm_90a.cubin";
        match std::fs::metadata(directory) {
            Err(error) => bail!("--kernel-dir {}: {error}; {expected}", directory.display()),
            Ok(found) if !found.is_dir() => bail!("--kernel-dir {}: found a file, {expected}", directory.display()),
            Ok(_) => {}
        }
        if self.device != DeviceKind::Cuda {
            tracing::warn!("--kernel-dir changes nothing: only --device cuda takes kernels from it");
        }
        Ok(())
    }

    /// The first GPU that this process sees, with a queue of its own.
    #[cfg(feature = "cuda")]
    fn gpu(&self) -> Result<Gpu> {
        let options = GpuOptions { ordinal: 0, kernel_dir: self.kernel_dir.clone() };
        Gpu::new(&options).map_err(|error| {
            let flag = if matches!(error, CudaError::Code { .. }) { "--kernel-dir" } else { "--device cuda" };
            anyhow::Error::new(error).context(flag)
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Result<AnyDevice> {
        let most = if self.no_graphs { 0 } else { GRAPHS };
        Ok(AnyDevice::Cuda(Arc::new(Cuda::new(Graphs::new(self.gpu()?, most)))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_rates(&self) -> Result<Box<dyn RateProbe>> {
        let (bytes, rounds) = (CudaRates::<Gpu>::BYTES, CudaRates::<Gpu>::ROUNDS);
        Ok(Box::new(CudaRates::new(self.gpu()?, bytes, rounds).context("--device cuda")?))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(&self) -> Result<AnyDevice> {
        bail!(WITHOUT_CUDA)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_rates(&self) -> Result<Box<dyn RateProbe>> {
        bail!(WITHOUT_CUDA)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_cuda_device_lacks_is_named() {
        let args =
            DeviceArgs { device: DeviceKind::Cuda, threads: Some(1), isa: None, kernel_dir: None, no_graphs: false };
        // Where it lacks nothing, there is a GPU.
        if let Err(error) = args.open() {
            assert!(format!("{error:#}").starts_with("--device cuda: "), "{error:#}");
            let error = args.rates().map(|_| "rates").unwrap_err();
            assert!(format!("{error:#}").starts_with("--device cuda: "), "{error:#}");
        }
    }

    #[test]
    fn a_directory_of_kernels_must_be_one() {
        for device in [DeviceKind::Cpu, DeviceKind::Cuda] {
            let open = |path: &str| {
                let kernel_dir = Some(PathBuf::from(path));
                DeviceArgs { device, threads: Some(1), isa: None, kernel_dir, no_graphs: false }
                    .open()
                    .err()
                    .map(|error| error.to_string())
            };
            let expected = "expected a directory of kernels, such as linear.sm_90a.cubin";
            let error = open("/nowhere").expect("refused");
            assert_eq!(error, format!("--kernel-dir /nowhere: No such file or directory (os error 2); {expected}"));
            let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
            assert_eq!(open(file).expect("refused"), format!("--kernel-dir {file}: found a file, {expected}"));
        }
        let there = DeviceArgs {
            device: DeviceKind::Cpu,
            threads: Some(1),
            isa: None,
            kernel_dir: Some(PathBuf::from(env!("CARGO_MANIFEST_DIR"))),
            no_graphs: false,
        };
        assert!(there.open().is_ok(), "the cpu device has no use for it");
    }
}
