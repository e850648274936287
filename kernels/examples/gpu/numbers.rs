//! Numbers that look random: in the device's memory, gigabytes of them, and known on the host, as they repeat. A matrix is a
//! window of them.

use bytemuck::{Pod, cast_slice};
use conclave_kernels::cuda::{CudaError, Driver};
use half::bf16;

use crate::runner::Stop;

/// Bytes that go to the device at once.
const CHUNK: usize = 64 << 20;

/// A type of numbers.
pub(crate) trait Number: Pod {
    /// One of random bits.
    fn draw(bits: u32) -> Self;
    fn value(self) -> f64;
}

/// In -1..1.
fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 / (1 << 23) as f32 - 1.0
}

impl Number for f32 {
    fn draw(bits: u32) -> Self {
        unit(bits)
    }

    fn value(self) -> f64 {
        f64::from(self)
    }
}

impl Number for bf16 {
    fn draw(bits: u32) -> Self {
        bf16::from_f32(unit(bits))
    }

    fn value(self) -> f64 {
        f64::from(self)
    }
}

/// FP8 e4m3.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub(crate) struct E4m3(u8);

impl Number for E4m3 {
    /// Of magnitude up to 4.
    fn draw(bits: u32) -> Self {
        Self(((bits >> 31 << 7) | ((bits >> 8) % 73)) as u8)
    }

    fn value(self) -> f64 {
        let (exponent, mantissa) = (i32::from(self.0 >> 3 & 15), f64::from(self.0 & 7));
        let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
        if self.0 > 127 { -magnitude } else { magnitude }
    }
}

/// A stretch of numbers.
pub(crate) struct Numbers<D: Driver, T> {
    _memory: D::Memory,
    address: u64,
    /// Elements.
    length: usize,
    /// What repeats.
    block: Vec<T>,
}

impl<D: Driver, T: Number> Numbers<D, T> {
    /// As many as fit into `bytes`, or into what the device has of that.
    pub(crate) fn new(driver: &D, bytes: usize, period: usize) -> Result<Self, CudaError> {
        let mut state = 0x2545_f491_4f6c_dd1du64 ^ size_of::<T>() as u64;
        let block: Vec<T> = (0..period)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                T::draw((state >> 16) as u32)
            })
            .collect();
        let (memory, bytes) = largest(driver, bytes)?;
        let length = bytes / size_of::<T>();
        let chunk = block.repeat((CHUNK / size_of_val(&block[..])).max(1));
        for first in (0..length).step_by(chunk.len()) {
            let part = &chunk[..chunk.len().min(length - first)];
            driver.upload(&memory, first * size_of::<T>(), cast_slice(part))?;
        }
        Ok(Self { address: driver.address(&memory), _memory: memory, length, block })
    }

    /// Where `length` of them from `first` on begin.
    pub(crate) fn window(&self, first: usize, length: usize) -> Result<u64, Stop> {
        if first + length > self.length {
            let gb = |elements: usize| (elements * size_of::<T>()) as f64 / 1e9;
            return Err(Stop::Skip(format!("takes {:.1} of {:.1} GB of numbers", gb(first + length), gb(self.length))));
        }
        Ok(self.address + (first * size_of::<T>()) as u64)
    }

    /// `length` of them from `first` on.
    pub(crate) fn values(&self, first: usize, length: usize) -> Vec<f64> {
        let (period, first) = (self.block.len(), first % self.block.len());
        let wrapped = |at: usize| if at < period { at } else { at % period };
        (first..first + length).map(|at| self.block[wrapped(at)].value()).collect()
    }
}

/// Memory of `bytes`, or a half of it, or a quarter, as far as the device has it.
pub(crate) fn largest<D: Driver>(driver: &D, mut bytes: usize) -> Result<(D::Memory, usize), CudaError> {
    loop {
        match driver.allocate(bytes) {
            Err(CudaError::Memory { .. }) if bytes > 1 << 20 => bytes /= 2,
            found => return Ok((found?, bytes)),
        }
    }
}

/// Numbers below a bound, the same in every run.
pub(crate) struct Picks(u64);

impl Picks {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 16) % bound as u64) as usize
    }
}
