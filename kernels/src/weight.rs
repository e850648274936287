//! A weight as it lies in the checkpoint.

mod blocks;

pub use blocks::BlockScales;
pub(crate) use blocks::E4M3;

use crate::{Dtype, KernelError};

/// A weight as it lies in the checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// Stored element type; of a matrix in FP8, the one that it is widened to.
    pub dtype: Dtype,
    /// `[rows, cols]`, row-major, any alignment: of `dtype`, or E4M3 where there are `scales`.
    pub data: &'a [u8],
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
    pub cols: usize,
    /// The matrix wanted is the transpose of what is stored.
    pub transposed: bool,
    /// Of a matrix in FP8, what its blocks are multiplied by.
    pub scales: Option<BlockScales<'a>>,
}

impl<'a> Weight<'a> {
    /// The matrix `[rows, cols]` that `data` holds.
    ///
    /// # Errors
    /// When `data` has another size than the shape.
    pub fn new(dtype: Dtype, data: &'a [u8], rows: usize, cols: usize) -> Result<Self, KernelError> {
        let weight = Self { dtype, data, rows, cols, transposed: false, scales: None };
        weight.check()?;
        Ok(weight)
    }

    /// The matrix `[rows, cols]` that `data` holds in E4M3.
    ///
    /// # Errors
    /// When `data` or the scales have another size than the shape.
    pub fn fp8(data: &'a [u8], rows: usize, cols: usize, scales: BlockScales<'a>) -> Result<Self, KernelError> {
        let weight = Self { dtype: Dtype::F32, data, rows, cols, transposed: false, scales: Some(scales) };
        weight.check()?;
        Ok(weight)
    }

    /// The transpose of this matrix.
    pub fn transpose(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Some of the rows as stored. More than there are is a bug of the caller and panics.
    pub fn slice(self, first: usize, rows: usize) -> Self {
        let row = self.cols * self.element();
        let scales = self.scales.map(|scales| scales.slice(first, rows, self.cols));
        Self { data: &self.data[first * row..(first + rows) * row], rows, scales, ..self }
    }

    /// Outputs and inputs of the matrix wanted.
    pub fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// The same matrix, in f32 in `memory` if it is in FP8.
    ///
    /// # Errors
    /// When the bytes do not match the shape.
    pub(crate) fn widen<'b>(self, memory: &'b mut Vec<u8>) -> Result<Weight<'b>, KernelError>
    where
        'a: 'b,
    {
        self.check()?;
        let Some(scales) = self.scales else { return Ok(self) };
        scales.widen(self.data, self.cols, memory);
        Ok(Weight { data: memory, scales: None, ..self })
    }

    /// Whether the bytes match the shape.
    pub(crate) fn check(&self) -> Result<(), KernelError> {
        let expected = self.rows.saturating_mul(self.cols).saturating_mul(self.element());
        let (rows, cols, found) = (self.rows, self.cols, self.data.len());
        if expected != found {
            let format = if self.scales.is_some() { "e4m3" } else { self.dtype.name() };
            return Err(KernelError::WeightSize { rows, cols, format, expected, found });
        }
        self.scales.map_or(Ok(()), |scales| scales.check(rows, cols))
    }

    /// Bytes of an element as stored.
    fn element(&self) -> usize {
        if self.scales.is_some() { 1 } else { self.dtype.size() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scales(count: usize) -> Vec<u8> {
        (0..count).flat_map(|at| (at as f32 + 1.0).to_le_bytes()).collect()
    }

    fn widened(weight: Weight<'_>) -> Vec<f32> {
        let mut memory = Vec::new();
        let weight = weight.widen(&mut memory).unwrap();
        weight.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    #[test]
    fn some_rows_have_the_values_that_they_have_in_the_whole() {
        // 7 x 5 in blocks of 3 x 2.
        let (bytes, factors): (Vec<u8>, _) = ((0x30..0x53).collect(), scales(9));
        let whole = Weight::fp8(&bytes, 7, 5, BlockScales::new(&factors, (3, 2))).unwrap();
        let expected = widened(whole);
        for (first, rows) in [(0, 7), (1, 4), (2, 1), (3, 3), (6, 1), (4, 0)] {
            let some = whole.slice(first, rows);
            assert_eq!(widened(some), expected[first * 5..(first + rows) * 5], "{rows} rows from {first} on");
            let again = some.slice(rows / 2, rows - rows / 2);
            assert_eq!(widened(again), expected[(first + rows / 2) * 5..(first + rows) * 5], "some of them");
        }
        let transposed = whole.slice(1, 4).transpose();
        assert_eq!(transposed.shape(), (5, 4));
        assert!(transposed.widen(&mut Vec::new()).unwrap().transposed);
        let plain = Weight::new(Dtype::Bf16, &bytes[..24], 4, 3).unwrap();
        assert_eq!(plain.slice(1, 2).data, &bytes[6..18]);
    }

    #[test]
    fn sizes_that_do_not_match_are_named() {
        let factors = scales(8);
        let error = |data: &[u8], scales| Weight::fp8(data, 7, 5, scales).unwrap_err().to_string();
        let nine = scales(9);
        assert_eq!(
            error(&[0; 70], BlockScales::new(&nine, (3, 2))),
            "weight of 7 x 5 e4m3: expected 35 bytes, found 70"
        );
        assert_eq!(
            error(&[0; 35], BlockScales::new(&factors, (3, 2))),
            "scales of 7 x 5 e4m3 in blocks of 3 x 2: expected 36 bytes, found 32"
        );
        assert_eq!(
            error(&[0; 35], BlockScales::new(&factors, (0, 2))),
            "scales of 7 x 5 e4m3 in blocks of 0 x 2: expected blocks of at least 1 x 1"
        );
    }
}
