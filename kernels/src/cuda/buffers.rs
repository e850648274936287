//! Memory of the CUDA device: buffers that grow, and working memory that is kept from one operation to the next.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    CudaError, Driver,
    kernel::Address,
    operand::Operand,
    plain::{DecodeBf16, RoundBf16},
};
use crate::{Dtype, activation};

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
    /// Whether it has as much.
    pub(super) fn suffices(&self, bytes: usize) -> bool {
        self.memory.is_some() && self.bytes >= bytes
    }

    /// Bytes that it has.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Memory of at least `bytes` bytes.
    pub(super) fn fit<D: Driver<Memory = M>>(&mut self, driver: &D, bytes: usize) -> Result<&M, CudaError> {
        if !self.suffices(bytes) {
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

/// Values on the device: in f32, in bf16, or in both. Who reads them in a form that is not there yet has it made, and it stays
/// until other values are written: what several products read is rounded once, and what was written in bf16 because only
/// products read it (which would round it) is not written in f32.
#[derive(Debug)]
pub struct CudaBuffer<M> {
    pub(super) length: usize,
    forms: Mutex<Forms<M>>,
}

/// The forms of a buffer's values.
#[derive(Debug)]
pub(super) struct Forms<M> {
    f32: Growing<M>,
    pub(super) bf16: Operand<M>,
    has: Has,
}

/// Which forms hold the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Has {
    F32,
    Bf16,
    Both,
}

impl<M> Default for CudaBuffer<M> {
    fn default() -> Self {
        let forms = Forms { f32: Growing::default(), bf16: Operand::default(), has: Has::F32 };
        Self { length: 0, forms: Mutex::new(forms) }
    }
}

impl<M> CudaBuffer<M> {
    fn forms(&mut self) -> &mut Forms<M> {
        self.forms.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is to be written: `length` values in f32.
    pub(super) fn fit<D: Driver<Memory = M>>(&mut self, driver: &D, length: usize) -> Result<Address, CudaError> {
        self.length = length;
        let forms = self.forms();
        forms.has = Has::F32;
        Ok(driver.address(forms.f32.fit(driver, length * Dtype::F32.size())?))
    }

    /// The same in bf16.
    pub(super) fn fit_bf16<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        length: usize,
    ) -> Result<&mut Operand<M>, CudaError> {
        self.length = length;
        let forms = self.forms();
        forms.has = Has::Bf16;
        forms.bf16.fit(driver, length)?;
        Ok(&mut forms.bf16)
    }

    /// The same in both forms.
    pub(super) fn fit_both<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        length: usize,
    ) -> Result<(Address, Address), CudaError> {
        let bf16 = self.fit_bf16(driver, length)?.address(driver)?;
        let f32 = self.fit(driver, length)?;
        self.forms().has = Has::Both;
        Ok((f32, bf16))
    }

    /// Where its f32 values lie, to be changed in place.
    pub(super) fn change<D: Driver<Memory = M>>(&mut self, driver: &D) -> Result<Address, CudaError> {
        let address = self.f32(driver)?;
        self.forms().has = Has::F32;
        Ok(address)
    }

    /// The same in the form in which they were written last.
    pub(super) fn change_as_it_is<D: Driver<Memory = M>>(&mut self, driver: &D) -> Result<(Address, Dtype), CudaError> {
        let length = self.length;
        match self.forms() {
            Forms { has: Has::Bf16, bf16, .. } => Ok((bf16.fit(driver, length)?, Dtype::Bf16)),
            _ => Ok((self.change(driver)?, Dtype::F32)),
        }
    }

    /// Where its values lie in f32.
    pub(super) fn f32<D: Driver<Memory = M>>(&self, driver: &D) -> Result<Address, CudaError> {
        let mut forms = self.forms.lock().unwrap_or_else(PoisonError::into_inner);
        let out = driver.address(forms.f32.fit(driver, self.length * Dtype::F32.size())?);
        if forms.has == Has::Bf16 {
            let x = forms.bf16.address(driver)?;
            DecodeBf16 { x, out, n: self.length as u64 }.launch(driver)?;
            forms.has = Has::Both;
        }
        Ok(out)
    }

    /// Its values in bf16. Nobody else makes or replaces forms, or maps of them, until the guard goes: hold it until what reads
    /// them is queued.
    pub(super) fn bf16<D: Driver<Memory = M>>(&self, driver: &D) -> Result<MutexGuard<'_, Forms<M>>, CudaError> {
        let mut forms = self.forms.lock().unwrap_or_else(PoisonError::into_inner);
        if forms.has == Has::F32 {
            let x = driver.address(forms.f32.fit(driver, self.length * Dtype::F32.size())?);
            let out = forms.bf16.fit(driver, self.length)?;
            RoundBf16 { x, out, n: self.length as u64 }.launch(driver)?;
            forms.has = Has::Both;
        }
        Ok(forms)
    }

    /// Makes it hold these values.
    pub(super) fn fill<D: Driver<Memory = M>>(&mut self, driver: &D, values: &[f32]) -> Result<(), CudaError> {
        self.fit(driver, values.len())?;
        driver.upload(self.forms().f32.fit(driver, 0)?, 0, bytemuck::cast_slice(values))
    }

    /// Makes it hold these values, bf16 in little-endian bytes.
    pub(super) fn fill_bf16<D: Driver<Memory = M>>(&mut self, driver: &D, bytes: &[u8]) -> Result<(), CudaError> {
        self.fit_bf16(driver, bytes.len() / Dtype::Bf16.size())?.upload(driver, bytes)
    }

    /// Waits, then copies all of it.
    pub(super) fn download<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        values: &mut Vec<f32>,
    ) -> Result<(), CudaError> {
        values.resize(self.length, 0.0);
        if self.length == 0 {
            return Ok(());
        }
        if self.forms().has == Has::Bf16 {
            let bytes = self.download_bf16(driver)?;
            activation::decode_into(Dtype::Bf16, &bytes, values);
            return Ok(());
        }
        driver.download(self.forms().f32.fit(driver, 0)?, 0, bytemuck::cast_slice_mut(values))
    }

    /// Waits, then copies all of it, rounded.
    fn download_bf16<D: Driver<Memory = M>>(&self, driver: &D) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; self.length * Dtype::Bf16.size()];
        self.bf16(driver)?.bf16.download(driver, &mut bytes)?;
        Ok(bytes)
    }

    /// Queues the copy of all of it, rounded, and of the f32 values of `other`.
    pub(super) fn fetch_with<D: Driver<Memory = M>>(&self, driver: &D, other: &mut Self) -> Result<D::Copy, CudaError> {
        other.f32(driver)?;
        let bytes = other.length * Dtype::F32.size();
        let mut rounded = self.bf16(driver)?;
        let (values, range) = rounded.bf16.values(driver, self.length)?;
        driver.fetch(&[(values, range), (other.forms().f32.fit(driver, 0)?, 0..bytes)])
    }
}
