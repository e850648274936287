//! Weights on the CUDA device: row-major, in bf16.

use std::borrow::Cow;

use super::{CudaError, Driver, plain::Address};
use crate::{Dtype, KernelError, RotaryTable, Weight, activation::to_bf16};

/// One or more matrices `[rows, cols]` of bf16, one behind the other.
#[derive(Debug)]
pub struct CudaMatrix<M> {
    _memory: M,
    pub(super) address: Address,
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl<M> CudaMatrix<M> {
    /// Takes matrices of one shape over.
    pub(super) fn load<D: Driver<Memory = M>>(driver: &D, weights: &[Weight<'_>]) -> Result<Self, KernelError> {
        let (rows, cols) = weights.first().map_or((0, 0), Weight::shape);
        assert!(weights.iter().all(|weight| weight.shape() == (rows, cols)), "matrices of {rows} x {cols}");
        let bytes = rows * cols * Dtype::Bf16.size();
        let memory = driver.allocate(bytes * weights.len())?;
        for (index, weight) in weights.iter().enumerate() {
            weight.check()?;
            driver.upload(&memory, index * bytes, &row_major(weight))?;
        }
        Ok(Self { address: driver.address(&memory), _memory: memory, count: weights.len(), rows, cols })
    }

    pub(super) fn bytes(&self) -> usize {
        self.count * self.rows * self.cols * Dtype::Bf16.size()
    }
}

/// The matrix wanted, row by row in bf16.
fn row_major<'a>(weight: &Weight<'a>) -> Cow<'a, [u8]> {
    if weight.dtype == Dtype::Bf16 && !weight.transposed {
        return Cow::Borrowed(weight.data);
    }
    let stored = |index: usize| -> u16 {
        match weight.dtype {
            Dtype::F32 => to_bf16(f32::from_le_bytes(weight.data.as_chunks().0[index])),
            Dtype::Bf16 => u16::from_le_bytes(weight.data.as_chunks().0[index]),
        }
    };
    let (rows, cols) = weight.shape();
    let at = |row: usize, col: usize| if weight.transposed { col * rows + row } else { row * cols + col };
    let elements = (0..rows).flat_map(|row| (0..cols).map(move |col| at(row, col)));
    Cow::Owned(elements.flat_map(|index| stored(index).to_le_bytes()).collect())
}

/// Cosines, then sines.
#[derive(Debug)]
pub struct CudaRotary<M> {
    _memory: M,
    pub(super) cos: Address,
    pub(super) sin: Address,
}

impl<M> CudaRotary<M> {
    pub(super) fn load<D: Driver<Memory = M>>(driver: &D, table: &RotaryTable) -> Result<Self, CudaError> {
        let (cos, sin): (&[u8], &[u8]) = (bytemuck::cast_slice(&table.cos), bytemuck::cast_slice(&table.sin));
        let memory = driver.allocate(cos.len() + sin.len())?;
        driver.upload(&memory, 0, cos)?;
        driver.upload(&memory, cos.len(), sin)?;
        let address = driver.address(&memory);
        Ok(Self { _memory: memory, cos: address, sin: address + cos.len() as u64 })
    }
}
