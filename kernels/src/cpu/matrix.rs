//! Weight matrices of the CPU device.

use std::ops::Range;

use super::kernels::{Tiles, e4m3};
use crate::{
    KernelError, Pool, Weight,
    arena::Arena,
    panels::{Panels, WIDTH},
};

/// Panels that are computed one after the other and then handed on, at most.
pub(super) const GROUP: usize = 8;
/// Steps of a panel in FP8 that have one scale.
pub(super) const SCALED: usize = 128;

/// A matrix `[outputs, inputs]` in panels.
pub enum CpuMatrix {
    /// In bf16.
    Bf16(Panels<u16>),
    /// In FP8, as in the checkpoint.
    Fp8(Fp8Panels),
}

/// A matrix in E4M3, each [`SCALED`] steps of each panel of which have a scale.
pub struct Fp8Panels {
    bytes: Panels<u8>,
    /// `[panels][ceil(inputs / SCALED)]`
    scales: Vec<f32>,
}

/// Sixteen outputs of a matrix.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    Bf16(&'a [u16]),
    Fp8 { bytes: &'a [u8], scales: &'a [f32] },
}

impl Panel<'_> {
    /// What sums over a piece of [`SCALED`] steps are multiplied by.
    pub(super) fn scale(&self, piece: usize) -> f32 {
        match self {
            Self::Bf16(_) => 1.0,
            Self::Fp8 { scales, .. } => e4m3::UNITS * scales[piece],
        }
    }

    /// Some of it in bf16, in `memory` if that is not how it is.
    pub(super) fn in_bf16<'b>(&self, elements: Range<usize>, memory: &'b mut [u16]) -> &'b [u16]
    where
        Self: 'b,
    {
        match self {
            Self::Bf16(panel) => &panel[elements],
            Self::Fp8 { bytes, .. } => {
                let memory = &mut memory[..elements.len()];
                e4m3::widen(&bytes[elements], SCALED * WIDTH, memory);
                memory
            }
        }
    }
}

impl CpuMatrix {
    /// Takes a weight over: one in FP8 as it is, if each sixteen outputs have a scale for each [`SCALED`] inputs and all is
    /// numbers; else in bf16.
    pub(super) fn load(arena: &Arena, pool: &Pool, weight: Weight<'_>) -> Result<Self, KernelError> {
        match weight.scales {
            Some(scales) if !weight.transposed && fits(scales.block, scales.skipped) && numbers(weight.data) => {
                Fp8Panels::pack(arena, pool, weight).map(Self::Fp8)
            }
            _ => Self::widened(arena, pool, weight),
        }
    }

    /// Takes a weight over in bf16.
    pub(super) fn widened(arena: &Arena, pool: &Pool, weight: Weight<'_>) -> Result<Self, KernelError> {
        Panels::pack(arena, pool, weight).map(Self::Bf16)
    }

    pub(super) fn outputs(&self) -> usize {
        match self {
            Self::Bf16(panels) => panels.outputs(),
            Self::Fp8(panels) => panels.bytes.outputs(),
        }
    }

    pub(super) fn inputs(&self) -> usize {
        match self {
            Self::Bf16(panels) => panels.inputs(),
            Self::Fp8(panels) => panels.bytes.inputs(),
        }
    }

    /// Number of panels.
    pub(super) fn count(&self) -> usize {
        self.outputs().div_ceil(WIDTH)
    }

    /// The inner dimension with its padding.
    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Bf16(panels) => panels.depth(),
            Self::Fp8(panels) => panels.bytes.depth(),
        }
    }

    /// Steps of the strips that its products want rows to be packed in.
    pub(super) fn strip(&self, tiles: &dyn Tiles) -> usize {
        match self {
            Self::Bf16(_) => tiles.strip(),
            Self::Fp8(_) => SCALED,
        }
    }

    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        match self {
            Self::Bf16(panels) => Panel::Bf16(panels.panel(index)),
            Self::Fp8(panels) => panels.panel(index),
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Bf16(panels) => panels.bytes(),
            Self::Fp8(panels) => panels.bytes.bytes() + size_of_val(&*panels.scales),
        }
    }
}

fn fits((rows, cols): (usize, usize), skipped: usize) -> bool {
    [(rows, WIDTH), (cols, SCALED), (skipped, WIDTH)].iter().all(|(size, unit)| size.is_multiple_of(*unit))
}

fn numbers(bytes: &[u8]) -> bool {
    !bytes.iter().any(|byte| byte & 0x7f == e4m3::NAN)
}

impl Fp8Panels {
    fn pack(arena: &Arena, pool: &Pool, weight: Weight<'_>) -> Result<Self, KernelError> {
        let bytes = Panels::pack_bytes(arena, pool, weight)?;
        let pieces = bytes.inputs().div_ceil(SCALED);
        let places = (0..bytes.count()).flat_map(|panel| (0..pieces).map(move |piece| (panel * WIDTH, piece * SCALED)));
        let scale = |(row, col)| weight.scales.map_or(1.0, |scales| scales.at(row, col, bytes.inputs()));
        let scales = places.map(scale).collect();
        Ok(Self { bytes, scales })
    }

    fn panel(&self, index: usize) -> Panel<'_> {
        let pieces = self.bytes.inputs().div_ceil(SCALED);
        Panel::Fp8 { bytes: self.bytes.panel(index), scales: &self.scales[index * pieces..][..pieces] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockScales;

    /// A matrix of 40 x 300, of which the byte in the middle is this one; with these blocks.
    fn load(middle: u8, block: (usize, usize), transposed: bool) -> CpuMatrix {
        let (rows, cols) = (40usize, 300usize);
        let mut bytes: Vec<u8> = (0..rows * cols).map(|at| (at % 0x7f) as u8).collect();
        bytes[rows / 2 * cols] = middle;
        let count = rows.div_ceil(block.0) * cols.div_ceil(block.1);
        let scales: Vec<u8> = (0..count).flat_map(|at| (at as f32).to_le_bytes()).collect();
        let weight = Weight::fp8(&bytes, rows, cols, BlockScales::new(&scales, block)).unwrap();
        let weight = if transposed { weight.transpose() } else { weight };
        CpuMatrix::load(&Arena::default(), &Pool::new(2).unwrap(), weight).unwrap()
    }

    #[test]
    fn bytes_stay_where_tiles_can_take_them() {
        let kept = |matrix: CpuMatrix| matches!(matrix, CpuMatrix::Fp8(_));
        assert!(kept(load(1, (128, 128), false)) && kept(load(1, (16, 256), false)));
        assert!(!kept(load(1, (8, 128), false)), "two scales among sixteen outputs");
        assert!(!kept(load(1, (16, 64), false)), "two scales in a piece");
        assert!(!kept(load(1, (128, 128), true)));
        assert!(!kept(load(0xff, (128, 128), false)), "not a number");
    }

    #[test]
    fn a_panel_has_its_bytes_and_scales() {
        let matrix = load(1, (16, 128), false);
        assert_eq!((matrix.outputs(), matrix.inputs(), matrix.count(), matrix.depth()), (40, 300, 3, 320));
        assert_eq!(matrix.bytes(), 48 * 320 + 9 * 4);
        let Panel::Fp8 { bytes, scales } = matrix.panel(2) else { panic!("kept as it is") };
        assert_eq!(scales, [6.0, 7.0, 8.0]);
        // Output 33, step 3; an output past the last; a step past the last.
        let at = |output: usize, step: usize| bytes[step / 2 * 32 + output % 16 * 2 + step % 2];
        assert_eq!((at(33, 3), at(40, 3), at(33, 300)), (((33 * 300 + 3) % 0x7f) as u8, 0, 0));
    }
}
