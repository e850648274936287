//! The paged latent cache in memory.

use memmap2::{MmapMut, MmapOptions};

use crate::{KernelError, MlaShape, panels::Element};

/// Blocks of latents of all layers, `[layers, blocks, positions, stride]`. A row holds the normed latent, then the
/// roped key, then zeros up to the stride.
pub struct LatentCache<T> {
    map: MmapMut,
    shape: MlaShape,
    layers: usize,
    blocks: usize,
    positions: usize,
    stride: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Element> LatentCache<T> {
    /// A zeroed cache of blocks of `positions` rows of `stride` elements; pages are taken when first written.
    pub(crate) fn new(
        (layers, blocks, positions): (usize, usize, usize),
        shape: &MlaShape,
        stride: usize,
    ) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Os { what: "map the latent cache", source };
        let bytes = [layers, blocks, positions, stride, size_of::<T>()]
            .into_iter()
            .try_fold(1usize, usize::checked_mul)
            .ok_or_else(|| failed(std::io::ErrorKind::OutOfMemory.into()))?;
        let map = MmapOptions::new().len(bytes.max(1)).no_reserve_swap().map_anon().map_err(failed)?;
        Ok(Self { map, shape: *shape, layers, blocks, positions, stride, element: std::marker::PhantomData })
    }

    pub(crate) fn shape(&self) -> &MlaShape {
        &self.shape
    }

    /// Elements from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// The first `rows` rows of a block: `[rows, stride]`.
    pub(crate) fn block(&self, layer: usize, block: u32, rows: usize) -> &[T] {
        assert!(rows <= self.positions, "{rows} rows of a block of {}", self.positions);
        let start = self.start(layer, block as usize * self.positions);
        &bytemuck::cast_slice(&self.map[..])[start..start + rows * self.stride]
    }

    /// The row of slot `block · positions + offset`.
    pub(crate) fn row_mut(&mut self, layer: usize, slot: u32) -> &mut [T] {
        let start = self.start(layer, slot as usize);
        let stride = self.stride;
        &mut bytemuck::cast_slice_mut(&mut self.map[..])[start..start + stride]
    }

    fn start(&self, layer: usize, slot: usize) -> usize {
        let slots = self.blocks * self.positions;
        assert!(layer < self.layers && slot < slots, "layer {layer} slot {slot} of {} x {slots}", self.layers);
        (layer * slots + slot) * self.stride
    }
}
