//! Weights in memory: matrices in panels of sixteen outputs, and tables of rows.
//!
//! A panel holds `[in / 2][16][2]` elements: two steps along the inner dimension for sixteen outputs lie together, as dot
//! products of pairs and matrix tiles want them. So one loop serves any number of rows, runs over the panel from front to
//! back, and sums each output in ascending order of the inner dimension. Outputs past the last are zero, and so are the
//! steps that fill the inner dimension up to a multiple of [`STEPS`].

mod interleave;
mod pack;

#[cfg(target_arch = "x86_64")]
pub(crate) use interleave::avx512::Interleaving;
pub(crate) use interleave::interleave;
pub(crate) use pack::{fetch, pack_rows};

use bytemuck::Pod;

use crate::{
    Dtype, KernelError, Weight, activation,
    arena::{Arena, Block},
    pool::Pool,
};

/// Outputs of one panel.
pub(crate) const WIDTH: usize = 16;
/// Elements of two steps: a pair for each output.
pub(crate) const PAIRS: usize = 2 * WIDTH;
/// The inner dimension of a panel is a multiple of this: one matrix tile.
pub(crate) const STEPS: usize = 32;

/// An element as weights and latents are kept in memory.
pub trait Element: Pod + Send + Sync {
    /// Its value.
    fn widen(self) -> f32;
    /// Rounded to this type.
    fn narrow(value: f32) -> Self;
    /// From the bits of a bf16.
    fn from_bf16(bits: u16) -> Self;
    /// Packs the first steps of sixteen rows of bf16, as many as it has a faster way for than one by one; how many.
    fn transpose(_rows: &[[u8; 2]], _to: &mut [Self]) -> usize {
        0
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn from_bf16(bits: u16) -> Self {
        activation::from_bf16(bits)
    }
}

/// The bits of a bf16.
impl Element for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        activation::from_bf16(self)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        activation::to_bf16(value)
    }

    #[inline(always)]
    fn from_bf16(bits: u16) -> Self {
        bits
    }

    fn transpose(rows: &[[u8; 2]], to: &mut [Self]) -> usize {
        pack::transpose(rows, to)
    }
}

fn read_f32<T: Element>(bytes: &[u8; 4]) -> T {
    T::narrow(f32::from_le_bytes(*bytes))
}

fn read_bf16<T: Element>(bytes: &[u8; 2]) -> T {
    T::from_bf16(u16::from_le_bytes(*bytes))
}

/// A matrix `[outputs, inputs]` in panels.
pub struct Panels<T> {
    block: Block<T>,
    outputs: usize,
    inputs: usize,
}

impl Panels<u8> {
    /// Copies the bytes of a weight in FP8, which is not transposed.
    pub(crate) fn pack_bytes(arena: &Arena, pool: &Pool, weight: Weight<'_>) -> Result<Self, KernelError> {
        weight.check()?;
        assert!(!weight.transposed && weight.data.len() == weight.rows * weight.cols, "a matrix of bytes");
        let mut panels = Self::zeroed(arena, pool, weight.shape())?;
        let length = WIDTH * panels.depth();
        pool.run_chunks(&mut panels.block, length, |panel, to| pack::panel_of_bytes(weight, panel * WIDTH, to));
        Ok(panels)
    }
}

impl<T: Element> Panels<T> {
    /// Copies a weight into panels; one in FP8 is widened first.
    pub(crate) fn pack(arena: &Arena, pool: &Pool, weight: Weight<'_>) -> Result<Self, KernelError> {
        let mut wide = Vec::new();
        let weight = weight.widen(&mut wide)?;
        let mut panels = Self::zeroed(arena, pool, weight.shape())?;
        let length = WIDTH * panels.depth();
        pool.run_chunks(&mut panels.block, length, |panel, to| pack::panel(weight, panel * WIDTH, to));
        Ok(panels)
    }
}

impl<T: Pod + Send + Sync> Panels<T> {
    fn zeroed(arena: &Arena, pool: &Pool, (outputs, inputs): (usize, usize)) -> Result<Self, KernelError> {
        let padded = |size: usize, unit: usize| size.checked_next_multiple_of(unit).unwrap_or(usize::MAX);
        let block = arena.block(pool, padded(outputs, WIDTH).saturating_mul(padded(inputs, STEPS)))?;
        Ok(Self { block, outputs, inputs })
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number of panels.
    pub(crate) fn count(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// The inner dimension with its padding.
    pub(crate) fn depth(&self) -> usize {
        self.inputs.next_multiple_of(STEPS)
    }

    /// Panel `index`: `[depth / 2][16][2]`.
    pub(crate) fn panel(&self, index: usize) -> &[T] {
        let length = WIDTH * self.depth();
        &self.block[index * length..][..length]
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.block)
    }
}

/// A table of rows, such as the embedding.
pub struct Rows<T> {
    block: Block<T>,
    cols: usize,
}

impl<T: Element> Rows<T> {
    /// Copies a table; one in FP8 is widened first.
    pub(crate) fn copy(arena: &Arena, pool: &Pool, weight: Weight<'_>) -> Result<Self, KernelError> {
        let mut wide = Vec::new();
        let weight = weight.widen(&mut wide)?;
        let (rows, cols) = weight.shape();
        let mut block = arena.block(pool, rows * cols)?;
        pool.run_chunks(&mut block, cols.max(1), |row, to| match weight.dtype {
            Dtype::F32 => copy_row(weight, row, to, read_f32),
            Dtype::Bf16 => copy_row(weight, row, to, read_bf16),
        });
        Ok(Self { block, cols })
    }

    pub(crate) fn row(&self, index: usize) -> &[T] {
        &self.block[index * self.cols..][..self.cols]
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }
}

fn copy_row<T: Element, const SIZE: usize>(
    weight: Weight<'_>,
    row: usize,
    to: &mut [T],
    read: impl Fn(&[u8; SIZE]) -> T,
) {
    let (stored, _) = weight.data.as_chunks::<SIZE>();
    let (start, step) = if weight.transposed { (row, weight.cols) } else { (row * weight.cols, 1) };
    let from = stored[start..].iter().step_by(step);
    to.iter_mut().zip(from).for_each(|(to, from)| *to = read(from));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(dtype: Dtype, data: &[u8], rows: usize, cols: usize, transposed: bool) -> Weight<'_> {
        Weight { dtype, data, rows, cols, transposed, scales: None }
    }

    #[test]
    fn packs_both_orientations_of_odd_sizes() {
        let pool = Pool::new(2).unwrap();
        let arena = Arena::default();
        for (rows, cols) in [(16, 1), (17, 3), (5, 300), (40, 129)] {
            let values: Vec<f32> = (0..rows * cols).map(|index| index as f32).collect();
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let mut shifted = vec![0];
                activation::encode_into(dtype, &values, &mut shifted);
                let mut expected = values.clone();
                activation::round(Dtype::Bf16, &mut expected);
                for transposed in [false, true] {
                    let packed =
                        Panels::<u16>::pack(&arena, &pool, weight(dtype, &shifted[1..], rows, cols, transposed))
                            .unwrap();
                    let (outputs, inputs) = if transposed { (cols, rows) } else { (rows, cols) };
                    assert_eq!((packed.outputs(), packed.inputs()), (outputs, inputs));
                    assert_eq!(packed.bytes(), outputs.next_multiple_of(16) * inputs.next_multiple_of(32) * 2);
                    for output in 0..packed.count() * WIDTH {
                        for input in 0..packed.depth() {
                            let at = input / 2 * PAIRS + output % WIDTH * 2 + input % 2;
                            let found = packed.panel(output / WIDTH)[at].widen();
                            let at = if transposed { input * cols + output } else { output * cols + input };
                            assert_eq!(found, if output < outputs && input < inputs { expected[at] } else { 0.0 });
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn refuses_bytes_of_another_size() {
        let pool = Pool::new(1).unwrap();
        let error = Panels::<f32>::pack(&Arena::default(), &pool, weight(Dtype::Bf16, &[0; 7], 2, 2, false)).err();
        assert_eq!(error.unwrap().to_string(), "weight of 2 x 2 bf16: expected 8 bytes, found 7");
        let error = Panels::<f32>::pack(&Arena::default(), &pool, weight(Dtype::F32, &[], usize::MAX, 3, false));
        assert!(error.is_err());
    }
}
