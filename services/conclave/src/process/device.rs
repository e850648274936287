//! What computes.

use std::sync::Arc;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use conclave_kernels::{Cpu, Isa, Pool, Reference};

/// Kinds of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The plain definitions, in f32: slow, for comparison.
    Reference,
    /// Fast kernels for this machine's processor, in bf16.
    Cpu,
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
}

/// A device that is there.
#[derive(Clone)]
pub enum AnyDevice {
    /// See [`DeviceKind::Reference`].
    Reference(Arc<Reference>),
    /// See [`DeviceKind::Cpu`].
    Cpu(Arc<Cpu>),
}

impl DeviceArgs {
    /// Makes the device and its threads.
    ///
    /// # Errors
    /// When the machine lacks the instruction set, or gives no threads.
    pub fn open(&self) -> Result<AnyDevice> {
        let pool = Pool::new(self.count()?)?;
        Ok(match self.device {
            DeviceKind::Reference => AnyDevice::Reference(Arc::new(Reference::new(pool))),
            DeviceKind::Cpu => AnyDevice::Cpu(Arc::new(Cpu::new(pool, self.isa)?)),
        })
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
}
