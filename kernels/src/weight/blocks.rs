//! FP8 weights with one scale a block (MODEL §2): `W[i, j] = e4m3(i, j) · scale[i / rows, j / cols]`.

use std::thread;

use crate::KernelError;

/// Elements that are worth a thread of their own.
const PER_THREAD: usize = 1 << 20;

/// What the blocks of a matrix in FP8 are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockScales<'a> {
    /// f32, little-endian, any alignment: `[ceil(rows / rows of a block), ceil(cols / cols of a block)]`.
    pub data: &'a [u8],
    /// Rows and columns of a block.
    pub block: (usize, usize),
    /// Rows of the first block that lie before the matrix.
    pub skipped: usize,
}

impl<'a> BlockScales<'a> {
    /// Of a matrix that begins with its first block.
    pub fn new(data: &'a [u8], block: (usize, usize)) -> Self {
        Self { data, block, skipped: 0 }
    }

    /// Those of `rows` rows from a row on, of `cols` columns.
    pub(super) fn slice(self, first: usize, rows: usize, cols: usize) -> Self {
        let (first, row) = (self.skipped + first, cols.div_ceil(self.block.1) * size_of::<f32>());
        let (from, skipped) = (first / self.block.0, first % self.block.0);
        let to = from + (skipped + rows).div_ceil(self.block.0);
        Self { data: &self.data[from * row..to.max(from) * row], skipped, ..self }
    }

    /// Whether they are as many as a matrix of this shape has.
    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<(), KernelError> {
        let (block, found) = (self.block, self.data.len());
        if block.0 == 0 || block.1 == 0 {
            return Err(KernelError::NoBlocks { rows, cols, block });
        }
        let of = rows.saturating_add(self.skipped).div_ceil(block.0).saturating_mul(cols.div_ceil(block.1));
        let expected = of.saturating_mul(size_of::<f32>());
        if expected == found { Ok(()) } else { Err(KernelError::ScalesSize { rows, cols, block, expected, found }) }
    }

    /// What an element of a matrix of `cols` columns is multiplied by.
    pub(crate) fn at(&self, row: usize, col: usize, cols: usize) -> f32 {
        let block = (self.skipped + row) / self.block.0 * cols.div_ceil(self.block.1) + col / self.block.1;
        f32::from_le_bytes(self.data.as_chunks().0[block])
    }

    /// Leaves the matrix in f32, little-endian, in `memory`. `values`: E4M3 `[rows, cols]`.
    pub(super) fn widen(&self, values: &[u8], cols: usize, memory: &mut Vec<u8>) {
        let (row_bytes, rows) = (cols * size_of::<f32>(), values.len() / cols.max(1));
        *memory = vec![0; rows * row_bytes];
        let threads = thread::available_parallelism().map_or(1, usize::from).min(values.len() / PER_THREAD + 1);
        let band = rows.div_ceil(threads).max(1);
        thread::scope(|scope| {
            for (index, out) in memory.chunks_mut((band * row_bytes).max(1)).enumerate() {
                let values = &values[index * band * cols..];
                scope.spawn(move || self.widen_band(values, cols, index * band, out));
            }
        });
    }

    fn widen_band(&self, values: &[u8], cols: usize, first_row: usize, out: &mut [u8]) {
        let per_row = cols.div_ceil(self.block.1) * size_of::<f32>();
        let rows = values.chunks_exact(cols).zip(out.chunks_exact_mut(cols * size_of::<f32>()));
        for (row, (values, out)) in (self.skipped + first_row..).zip(rows) {
            let scales = &self.data[row / self.block.0 * per_row..][..per_row];
            let blocks = values.chunks(self.block.1).zip(out.chunks_mut(self.block.1 * size_of::<f32>()));
            for (scale, (values, out)) in scales.as_chunks().0.iter().zip(blocks) {
                let scale = f32::from_le_bytes(*scale);
                for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                    *out = (E4M3[*value as usize] * scale).to_le_bytes();
                }
            }
        }
    }
}

/// The value of every byte: a sign, four bits of exponent (bias 7), three of mantissa; no infinities, two NaNs.
pub(crate) const E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        values[byte] = value(byte as u8);
        byte += 1;
    }
    values
};

const fn value(byte: u8) -> f32 {
    let (exponent, mantissa) = (byte >> 3 & 15, byte & 7);
    let size = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        // 2⁻⁹ for each step below the least normal number.
        (0, steps) => steps as f32 / 512.0,
        // The same bits in place, and the bias of single precision.
        _ => f32::from_bits((exponent as u32 + 127 - 7) << 23 | (mantissa as u32) << 20),
    };
    if byte >> 7 == 1 { -size } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_values_of_the_format() {
        let of = |byte: u8| E4M3[byte as usize];
        assert_eq!([of(0x00), of(0x80), of(0x01), of(0x07)], [0.0, -0.0, 1.0 / 512.0, 7.0 / 512.0]);
        assert_eq!([of(0x08), of(0x38), of(0x39), of(0xb8)], [1.0 / 64.0, 1.0, 1.125, -1.0]);
        assert_eq!([of(0x7e), of(0xfe), of(0x40)], [448.0, -448.0, 2.0]);
        assert!(of(0x7f).is_nan() && of(0xff).is_nan());
        let finite: Vec<f32> = (0..0x7f).map(of).collect();
        assert!(finite.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn each_block_has_its_scale() {
        // 5 × 7 ones in blocks of 2 × 3: at the edges a row and a column are left.
        let scales: Vec<u8> = (0..9u8).flat_map(|index| f32::from(index).to_le_bytes()).collect();
        let mut memory = vec![9; 3];
        BlockScales::new(&scales, (2, 3)).widen(&[0x38; 35], 7, &mut memory);
        let found: Vec<f32> = memory.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let expected: Vec<f32> = (0..35).map(|at| (at / 7 / 2 * 3 + at % 7 / 3) as f32).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn large_matrices_are_widened_by_several_threads() {
        let (rows, cols) = (3000usize, 1100usize);
        let values: Vec<u8> = (0..rows * cols).map(|at| (at * 31 % 0x7f) as u8).collect();
        let per_row = cols.div_ceil(128);
        let scale = |row: usize, col: usize| (row / 128 * per_row + col / 128) as f32 / 8.0 + 1.0;
        let scales: Vec<u8> =
            (0..rows.div_ceil(128) * per_row).flat_map(|i| (i as f32 / 8.0 + 1.0).to_le_bytes()).collect();
        let mut memory = Vec::new();
        BlockScales::new(&scales, (128, 128)).widen(&values, cols, &mut memory);
        let found: &[[u8; 4]] = memory.as_chunks().0;
        assert_eq!(found.len(), rows * cols);
        for at in (0..rows * cols).step_by(997) {
            let expected = E4M3[values[at] as usize] * scale(at / cols, at % cols);
            assert_eq!(f32::from_le_bytes(found[at]), expected, "{at}");
        }
    }
}
