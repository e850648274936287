//! What a GPU gives at most.

use super::{Arg, CudaError, Driver, Launch, sm90};
use crate::{KernelError, RateProbe};

/// `RATE_THREADS` and `CHAINS` of `rates.cuh`.
const THREADS: u32 = 256;
const CHAINS: f64 = 16.0;
/// Blocks a multiprocessor: all threads that it has room for.
const BLOCKS: usize = 8;
/// Multiply-adds of a round and block of `sm90_rate_products`, and its dynamic shared memory.
const PRODUCTS: f64 = (2 * 64 * 256 * 64) as f64;
const SHARED: u32 = 49_152;

/// Reads a GPU's memory from front to back; multiplies on its tensor cores, or, where there are no products for its chip,
/// adds products of f32. Times are those of the GPU's clock.
pub struct CudaRates<D: Driver> {
    driver: D,
    memory: D::Memory,
    bytes: usize,
    rounds: u32,
    out: D::Memory,
}

impl<D: Driver> CudaRates<D> {
    /// Bytes that are read: many times the second-level cache.
    pub const BYTES: usize = 2 << 30;
    /// Rounds of products or multiply-adds: some milliseconds on an H200.
    pub const ROUNDS: u32 = 10_000;

    /// Takes `bytes` of memory.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(driver: D, bytes: usize, rounds: u32) -> Result<Self, CudaError> {
        let (memory, threads) = (driver.allocate(bytes)?, driver.multiprocessors() * BLOCKS * THREADS as usize);
        driver.zero(&memory, 0..bytes)?;
        let out = driver.allocate(threads * size_of::<f32>())?;
        Ok(Self { driver, memory, bytes, rounds, out })
    }

    /// Whether there are products on tensor cores.
    fn products(&self) -> bool {
        self.driver.chip() == sm90::CHIP
    }

    /// The driver below.
    pub fn driver(&self) -> &D {
        &self.driver
    }

    /// Queues one pass over all of the memory: what lay in the second-level cache is then no longer there.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(&self) -> Result<(), CudaError> {
        let [x, out] = [&self.memory, &self.out].map(|memory| Arg::Address(self.driver.address(memory)));
        let words = Arg::U64((self.bytes / 16) as u64);
        self.launch("rate_reads", self.driver.multiprocessors() * BLOCKS, 0, &[x, out, words])
    }

    /// Queues the rounds of multiply-adds on the whole chip; how many multiply-adds that is.
    fn multiply(&self) -> Result<f64, CudaError> {
        let arguments = [Arg::Address(self.driver.address(&self.out)), Arg::U32(self.rounds)];
        let (kernel, blocks, shared, of_a_block) = match self.products() {
            true => ("sm90_rate_products", 1, SHARED, PRODUCTS),
            false => ("rate_multiply_adds", BLOCKS, 0, CHAINS * f64::from(THREADS)),
        };
        let blocks = blocks * self.driver.multiprocessors();
        self.launch(kernel, blocks, shared, &arguments)?;
        Ok(of_a_block * blocks as f64 * f64::from(self.rounds))
    }

    fn launch(&self, kernel: &'static str, blocks: usize, shared: u32, arguments: &[Arg<'_>]) -> Result<(), CudaError> {
        let (grid, block) = ([blocks as u32, 1, 1], [THREADS, 1, 1]);
        self.driver.launch(&Launch { kernel, grid, block, shared, arguments })
    }

    /// What is done a second, by the GPU's clock.
    fn rate(&self, work: impl FnOnce() -> Result<f64, CudaError>) -> Result<f64, KernelError> {
        let from = self.driver.mark()?;
        let done = work()?;
        let to = self.driver.mark()?;
        Ok(done / self.driver.seconds(&from, &to)?)
    }
}

impl<D: Driver> RateProbe for CudaRates<D> {
    fn about(&self) -> String {
        let what = if self.products() { "bf16 on tensor cores" } else { "f32" };
        format!("{}, {what}", self.driver.name())
    }

    fn read_rate(&self) -> Result<f64, KernelError> {
        self.rate(|| self.read().map(|()| self.bytes as f64))
    }

    fn multiply_add_rate(&self) -> Result<f64, KernelError> {
        self.rate(|| self.multiply())
    }

    fn host_bytes(&self) -> u64 {
        0
    }
}
