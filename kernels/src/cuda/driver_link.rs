//! Links between the devices of two processes, as a driver has them.

use std::ops::Range;

use super::{CudaError, Driver, Launch};
use crate::link::Until;

/// One end of a link. It has a queue of its own beside the driver's, and belongs to one thread.
pub trait DriverLink<M> {
    /// Queues the copy of `bytes` to `offset`.
    ///
    /// # Errors
    /// When the device fails.
    fn upload(&mut self, memory: &M, offset: usize, bytes: &[u8]) -> Result<(), CudaError>;
    /// Queues a kernel.
    ///
    /// # Errors
    /// As for [`Driver::launch`].
    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), CudaError>;
    /// Sends these bytes of memory as they are when this queue comes to it, and waits until that is done. An end that has met
    /// an error is of no use any more.
    ///
    /// # Errors
    /// When the other end is lost, or does not receive in time.
    fn send(&mut self, memory: &M, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError>;
    /// The same in the other direction: exactly as many bytes as are sent.
    ///
    /// # Errors
    /// As for [`DriverLink::send`].
    fn receive(&mut self, memory: &M, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError>;
}

/// An end on a driver, for memory of that driver.
pub type AnyLink<'d, D> = Box<dyn DriverLink<<D as Driver>::Memory> + 'd>;
