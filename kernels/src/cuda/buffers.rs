//! Memory of the CUDA device: buffers that grow, and working memory that is kept from one operation to the next.

use super::{CudaError, Driver, plain::Address};

/// Every part of working memory begins at a multiple of this.
const ALIGN: usize = 256;

/// Memory that is replaced by more when it does not suffice; what was in it is then lost.
#[derive(Debug)]
pub(super) struct Growing<M> {
    memory: Option<M>,
    bytes: usize,
}

impl<M> Default for Growing<M> {
    fn default() -> Self {
        Self { memory: None, bytes: 0 }
    }
}

impl<M> Growing<M> {
    /// Memory of at least `bytes` bytes.
    pub(super) fn fit<D: Driver<Memory = M>>(&mut self, driver: &D, bytes: usize) -> Result<&M, CudaError> {
        if self.memory.is_none() || self.bytes < bytes {
            // The old memory goes first: both may be more than there is.
            self.memory = None;
            self.memory = Some(driver.allocate(bytes)?);
            self.bytes = bytes;
        }
        Ok(self.memory.as_ref().expect("put in above"))
    }

    /// Parts of these many bytes: the memory, and where each begins in it.
    pub(super) fn parts<D: Driver<Memory = M>, const N: usize>(
        &mut self,
        driver: &D,
        bytes: [usize; N],
    ) -> Result<(&M, [usize; N]), CudaError> {
        let mut end = 0;
        let starts = bytes.map(|bytes| {
            let start = end;
            end = (end + bytes).next_multiple_of(ALIGN);
            start
        });
        Ok((self.fit(driver, end)?, starts))
    }
}

/// f32 values on the device.
#[derive(Debug)]
pub struct CudaBuffer<M> {
    values: Growing<M>,
    pub(super) length: usize,
    pub(super) address: Address,
}

impl<M> Default for CudaBuffer<M> {
    fn default() -> Self {
        Self { values: Growing::default(), length: 0, address: 0 }
    }
}

impl<M> CudaBuffer<M> {
    /// Makes it `length` values long; where it begins.
    pub(super) fn fit<D: Driver<Memory = M>>(&mut self, driver: &D, length: usize) -> Result<Address, CudaError> {
        let memory = self.values.fit(driver, length * size_of::<f32>())?;
        (self.address, self.length) = (driver.address(memory), length);
        Ok(self.address)
    }

    /// Makes it hold these values.
    pub(super) fn fill<D: Driver<Memory = M>>(&mut self, driver: &D, values: &[f32]) -> Result<(), CudaError> {
        self.fit(driver, values.len())?;
        driver.upload(self.values.fit(driver, 0)?, 0, bytemuck::cast_slice(values))
    }

    /// Waits, then copies all of it.
    pub(super) fn download<D: Driver<Memory = M>>(&self, driver: &D, values: &mut Vec<f32>) -> Result<(), CudaError> {
        values.resize(self.length, 0.0);
        match &self.values.memory {
            Some(memory) => driver.download(memory, 0, bytemuck::cast_slice_mut(values)),
            None => Ok(()),
        }
    }
}
