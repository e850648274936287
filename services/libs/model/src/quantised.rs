//! FP8 weights with one scale a block (MODEL §2): `W[i, j] = e4m3(i, j) · scale[i / rows, j / cols]`.

use std::thread;

use crate::config::BlockQuantization;

/// Elements that are worth a thread of their own.
const PER_THREAD: usize = 1 << 20;

/// A matrix as it is stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quantised<'a> {
    /// E4M3 `[out, cols]`
    pub(crate) values: &'a [u8],
    /// f32, little-endian `[ceil(out / rows), ceil(cols / cols of a block)]`
    pub(crate) scales: &'a [u8],
    pub(crate) cols: usize,
    pub(crate) block: BlockQuantization,
}

impl Quantised<'_> {
    /// Leaves the matrix in f32, little-endian, in `memory`.
    pub(crate) fn widen(&self, memory: &mut Vec<u8>) {
        let (row_bytes, rows) = (self.cols * 4, self.values.len() / self.cols.max(1));
        memory.resize(rows * row_bytes, 0);
        let threads = thread::available_parallelism().map_or(1, usize::from).min(self.values.len() / PER_THREAD + 1);
        // Whole blocks each.
        let band = rows.div_ceil(threads).next_multiple_of(self.block.rows).max(1);
        thread::scope(|scope| {
            for (index, out) in memory.chunks_mut((band * row_bytes).max(1)).enumerate() {
                scope.spawn(move || self.widen_band(index * band, out));
            }
        });
    }

    fn widen_band(&self, first_row: usize, out: &mut [u8]) {
        let per_row = self.cols.div_ceil(self.block.cols);
        for (row, out) in (first_row..).zip(out.chunks_exact_mut(self.cols * 4)) {
            let scales = &self.scales[row / self.block.rows * per_row * 4..][..per_row * 4];
            let values = &self.values[row * self.cols..][..self.cols];
            let blocks = values.chunks(self.block.cols).zip(out.chunks_mut(self.block.cols * 4));
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
const E4M3: [f32; 256] = {
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
        let block = BlockQuantization { rows: 2, cols: 3 };
        let scales: Vec<u8> = (0..9u8).flat_map(|index| f32::from(index).to_le_bytes()).collect();
        let mut memory = vec![9; 3];
        Quantised { values: &[0x38; 35], scales: &scales, cols: 7, block }.widen(&mut memory);
        let found: Vec<f32> = memory.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let expected: Vec<f32> = (0..35).map(|at| (at / 7 / 2 * 3 + at % 7 / 3) as f32).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn large_matrices_are_widened_by_several_threads() {
        let (rows, cols, block) = (3000usize, 1100usize, BlockQuantization { rows: 128, cols: 128 });
        let values: Vec<u8> = (0..rows * cols).map(|at| (at * 31 % 0x7f) as u8).collect();
        let per_row = cols.div_ceil(128);
        let scale = |row: usize, col: usize| (row / 128 * per_row + col / 128) as f32 / 8.0 + 1.0;
        let scales: Vec<u8> =
            (0..rows.div_ceil(128) * per_row).flat_map(|i| (i as f32 / 8.0 + 1.0).to_le_bytes()).collect();
        let mut memory = Vec::new();
        Quantised { values: &values, scales: &scales, cols, block }.widen(&mut memory);
        let found: &[[u8; 4]] = memory.as_chunks().0;
        assert_eq!(found.len(), rows * cols);
        for at in (0..rows * cols).step_by(997) {
            let expected = E4M3[values[at] as usize] * scale(at / cols, at % cols);
            assert_eq!(f32::from_le_bytes(found[at]), expected, "{at}");
        }
    }
}
