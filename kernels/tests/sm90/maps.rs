//! Tensor maps as the shim reads them: the 128 bytes of `Map` in `cuda/sm90/primitives_plain.cuh`.

use conclave_kernels::cuda::ShimMemory;

use crate::support::Rig;

/// A view of up to four dimensions, innermost first, and the tile that one load brings.
#[derive(Clone, Copy, Default)]
pub(crate) struct Map {
    address: u64,
    dimensions: u32,
    element: u32,
    swizzled: bool,
    size: [u64; 4],
    /// In bytes; the innermost is not used.
    stride: [u64; 4],
    tile: [u32; 4],
}

impl Map {
    /// Rows of `inner` elements of `element` bytes, one after the other; tiles of `rows` rows and 128 bytes, swizzled.
    pub(crate) fn rows(address: u64, element: u32, (total, inner): (usize, usize), rows: u32) -> Self {
        let pitch = u64::from(element) * inner as u64;
        Self {
            size: [inner as u64, total as u64, 0, 0],
            stride: [0, pitch, 0, 0],
            tile: [128 / element, rows, 0, 0],
            ..Self::new(address, 2, element, true)
        }
    }

    /// Gate `[outputs, inner]` and up after it, by turns of eight rows: tiles of 32 rows of each.
    pub(crate) fn gated(address: u64, element: u32, (outputs, inner): (usize, usize)) -> Self {
        let pitch = u64::from(element) * inner as u64;
        Self {
            size: [inner as u64, 8, 2, outputs as u64 / 8],
            stride: [0, pitch, pitch * outputs as u64, pitch * 8],
            tile: [128 / element, 8, 2, 4],
            ..Self::new(address, 4, element, true)
        }
    }

    /// Scales f32 `[blocks, pitch]` of `tokens` tokens; tiles of 32 tokens.
    pub(crate) fn scales(address: u64, (blocks, tokens, pitch): (usize, usize, usize)) -> Self {
        Self {
            size: [tokens as u64, blocks as u64, 0, 0],
            stride: [0, 4 * pitch as u64, 0, 0],
            tile: [32, 1, 0, 0],
            ..Self::new(address, 2, 4, false)
        }
    }

    fn new(address: u64, dimensions: u32, element: u32, swizzled: bool) -> Self {
        Self { address, dimensions, element, swizzled, ..Self::default() }
    }

    /// The map in the device's memory.
    pub(crate) fn upload(self, rig: &Rig) -> ShimMemory {
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let tile = [pair(self.tile[0], self.tile[1]), pair(self.tile[2], self.tile[3])];
        let head = [self.address, pair(self.dimensions, self.element), self.swizzled.into()];
        let mut words = [&head[..], &self.size, &self.stride, &tile].concat();
        words.resize(16, 0);
        rig.upload(&words)
    }
}
