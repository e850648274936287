//! Memory of the CUDA device that other processes see, and its board.

use std::sync::{Arc, atomic::AtomicBool};

use super::{CudaBuffer, CudaError, Driver, kernel::Address, plain::RoundBf16};
use crate::{Dtype, Published};

/// Memory of this device that others may read, or of another process's.
#[derive(Debug)]
pub struct CudaShared<M> {
    memory: M,
    bytes: usize,
}

impl<M> CudaShared<M> {
    /// Memory of `bytes` zeros, and its handle.
    pub(super) fn new<D: Driver<Memory = M>>(driver: &D, bytes: usize) -> Result<(Self, Vec<u8>), CudaError> {
        let (memory, handle) = driver.export(bytes)?;
        Ok((Self { memory, bytes }, handle))
    }

    /// Memory of `bytes` bytes for this process alone.
    pub(super) fn kept<D: Driver<Memory = M>>(driver: &D, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { memory: driver.allocate(bytes)?, bytes })
    }

    /// Another process's, of at least `bytes` bytes.
    pub(super) fn open<D: Driver<Memory = M>>(driver: &D, handle: &[u8], bytes: usize) -> Result<Self, CudaError> {
        let (memory, found) = driver.import(handle)?;
        let shared = Self { memory, bytes: found };
        shared.holds(bytes)?;
        Ok(shared)
    }

    /// Reads its beginning, at once.
    pub(super) fn read<D: Driver<Memory = M>>(&self, driver: &D, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.holds(bytes.len())?;
        driver.download_beside(&self.memory, 0, bytes)
    }

    /// Where it begins, if it has as many bytes.
    pub(super) fn address<D: Driver<Memory = M>>(&self, driver: &D, bytes: usize) -> Result<Address, CudaError> {
        self.holds(bytes)?;
        Ok(driver.address(&self.memory))
    }

    /// The memory, if it has as many bytes.
    pub(super) fn beginning(&self, bytes: usize) -> Result<&M, CudaError> {
        self.holds(bytes)?;
        Ok(&self.memory)
    }

    fn holds(&self, bytes: usize) -> Result<(), CudaError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let detail = format!("asked for {bytes} bytes, there are {}", self.bytes);
        Err(CudaError::Device { what: "use shared memory", detail })
    }
}

/// The rows of one layer, for others to read.
pub(super) struct Board<M> {
    memory: CudaShared<M>,
    /// Empty: nobody else is to open it.
    handle: Vec<u8>,
    taken: Arc<AtomicBool>,
}

impl<M> Board<M> {
    /// The board in `slot`, made by `make` (memory and handle) if there is none.
    pub(super) fn make(
        slot: &mut Option<Self>,
        bytes: usize,
        make: impl FnOnce() -> Result<(CudaShared<M>, Vec<u8>), CudaError>,
    ) -> Result<&Self, CudaError> {
        if slot.is_none() {
            let (memory, handle) = make()?;
            *slot = Some(Self { memory, handle, taken: Arc::default() });
        }
        let board = slot.as_ref().expect("put in above");
        board.memory.holds(bytes)?;
        Ok(board)
    }

    /// What others open it by.
    pub(super) fn handle(&self) -> Result<Vec<u8>, CudaError> {
        if self.handle.is_empty() {
            let detail = "it was made for this process alone".to_owned();
            return Err(CudaError::Device { what: "share the board", detail });
        }
        Ok(self.handle.clone())
    }

    /// Where it begins, if it has as many bytes.
    pub(super) fn address<D: Driver<Memory = M>>(&self, driver: &D, bytes: usize) -> Result<Address, CudaError> {
        self.memory.address(driver, bytes)
    }

    /// Queues the copy of `x`, rounded. `None` where it does not fit, or what is there may still be wanted.
    pub(super) fn publish<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        x: &CudaBuffer<M>,
    ) -> Result<Option<Published>, CudaError> {
        let Ok(out) = self.memory.address(driver, x.length * Dtype::Bf16.size()) else { return Ok(None) };
        let Some(published) = Published::take(&self.taken) else { return Ok(None) };
        RoundBf16 { x: x.f32(driver)?, out, n: x.length as u64 }.launch(driver)?;
        Ok(Some(published))
    }
}
