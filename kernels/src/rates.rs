//! What the hardware below a device gives at most, measured.

use crate::KernelError;

/// Measures what a device is measured against: reads of its memory, and multiply-adds of what lies at hand.
pub trait RateProbe: Send + Sync {
    /// What is measured, for people: `2 threads, avx2`.
    fn about(&self) -> String;
    /// Bytes a second of one pass over memory much larger than the caches.
    ///
    /// # Errors
    /// When the device fails.
    fn read_rate(&self) -> Result<f64, KernelError>;
    /// Multiply-adds a second: some milliseconds of nothing else.
    ///
    /// # Errors
    /// When the device fails.
    fn multiply_add_rate(&self) -> Result<f64, KernelError>;
    /// Bytes of the host's memory that it holds.
    fn host_bytes(&self) -> u64;
}
