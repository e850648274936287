//! A weight as it lies in the checkpoint.

use crate::{Dtype, KernelError};

/// A weight as it lies in the checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// Stored element type.
    pub dtype: Dtype,
    /// `[rows, cols]`, row-major, any alignment.
    pub data: &'a [u8],
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
    pub cols: usize,
    /// The matrix wanted is the transpose of what is stored.
    pub transposed: bool,
}

impl<'a> Weight<'a> {
    /// The matrix `[rows, cols]` that `data` holds.
    ///
    /// # Errors
    /// When `data` has another size than the shape.
    pub fn new(dtype: Dtype, data: &'a [u8], rows: usize, cols: usize) -> Result<Self, KernelError> {
        let weight = Self { dtype, data, rows, cols, transposed: false };
        weight.check()?;
        Ok(weight)
    }

    /// The transpose of this matrix.
    pub fn transpose(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Outputs and inputs of the matrix wanted.
    pub fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// Whether the bytes match the shape.
    pub(crate) fn check(&self) -> Result<(), KernelError> {
        let expected = self.rows.saturating_mul(self.cols).saturating_mul(self.dtype.size());
        let (rows, cols, dtype, found) = (self.rows, self.cols, self.dtype, self.data.len());
        if expected == found { Ok(()) } else { Err(KernelError::WeightSize { rows, cols, dtype, expected, found }) }
    }
}
