//! Tensor maps: what the copy engine of sm_90 (TMA) must know of a tensor in device memory.

/// Most dimensions of a map.
pub const MOST_DIMENSIONS: usize = 4;

/// Bytes of a map, in the driver's own form. In device memory it must lie at a multiple of 128.
pub type EncodedMap = [u8; 128];

/// Type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// bf16
    Bf16,
    /// FP8 e4m3
    E4m3,
    /// f32
    F32,
}

impl Element {
    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::E4m3 => 1,
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A tensor, and the tiles that are copied of it. Dimensions are innermost first; what a tile has outside of the tensor is
/// zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap<'a> {
    /// Where it begins: a multiple of 16.
    pub address: u64,
    /// Type of its elements.
    pub element: Element,
    /// Elements along each of its two to four dimensions.
    pub dims: &'a [u64],
    /// Bytes from one element to the next along each dimension but the first: multiples of 16 below 2^40.
    pub strides: &'a [u64],
    /// Elements of a tile along each dimension, up to 256.
    pub tile: &'a [u32],
    /// Whether the 16-byte parts of tiles of 128-byte rows are exchanged in shared memory ("128 B swizzle").
    pub swizzle: bool,
}

impl TensorMap<'_> {
    /// Whether the copy engine can take it.
    ///
    /// # Errors
    /// Says what is wrong with the map.
    pub fn check(&self) -> Result<(), String> {
        let rank = self.dims.len();
        let (strides, tile) = (self.strides.len(), self.tile.len());
        if !(2..=MOST_DIMENSIONS).contains(&rank) || strides + 1 != rank || tile != rank {
            return Err(format!(
                "found {rank} dimensions, {strides} strides and {tile} of a tile, expected n, n - 1, n"
            ));
        }
        let possible = |stride: &u64| stride.is_multiple_of(16) && *stride < 1 << 40;
        if !self.address.is_multiple_of(16) || !self.strides.iter().all(possible) {
            let (address, strides) = (self.address, self.strides);
            return Err(format!(
                "found address {address:#x} and strides {strides:?}, expected multiples of 16, strides below 2^40"
            ));
        }
        let row = self.tile[0] as usize * self.element.size();
        if self.tile.iter().any(|extent| !(1..=256).contains(extent)) || !row.is_multiple_of(16) {
            return Err(format!("found a tile of {:?}, expected 1 to 256 and rows of 16 bytes", self.tile));
        }
        if self.swizzle && row > 128 {
            return Err(format!("found rows of {row} bytes in a tile, expected at most 128"));
        }
        Ok(())
    }

    /// The form that the shim's copies read: `struct Map` of `cuda/sm90/primitives_plain.cuh`.
    #[cfg(feature = "cuda-shim")]
    pub(super) fn plain(&self) -> EncodedMap {
        let mut bytes = Vec::with_capacity(size_of::<EncodedMap>());
        bytes.extend(self.address.to_le_bytes());
        let words = [self.dims.len() as u32, self.element.size() as u32, u32::from(self.swizzle), 0];
        bytes.extend(words.map(u32::to_le_bytes).as_flattened());
        let padded =
            |values: &[u64]| -> [u64; MOST_DIMENSIONS] { std::array::from_fn(|at| *values.get(at).unwrap_or(&0)) };
        bytes.extend(padded(self.dims).map(u64::to_le_bytes).as_flattened());
        // The first one is that of single elements, which nobody reads.
        bytes.extend(padded(&[&[0], self.strides].concat()).map(u64::to_le_bytes).as_flattened());
        self.tile.iter().for_each(|extent| bytes.extend(extent.to_le_bytes()));
        bytes.resize(size_of::<EncodedMap>(), 0);
        bytes.try_into().expect("128 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: TensorMap<'_> = TensorMap {
        address: 0x1000,
        element: Element::Bf16,
        dims: &[512, 7],
        strides: &[1024],
        tile: &[64, 16],
        swizzle: true,
    };

    #[test]
    fn what_does_not_fit_is_named() {
        assert_eq!(MAP.check(), Ok(()));
        let error = |map: TensorMap<'_>| map.check().unwrap_err();
        assert!(error(TensorMap { dims: &[512], ..MAP }).starts_with("found 1 dimensions, 1 strides and 2 of a tile"));
        for map in [TensorMap { strides: &[1000], ..MAP }, TensorMap { strides: &[1 << 40], ..MAP }] {
            assert!(error(map).ends_with("expected multiples of 16, strides below 2^40"));
        }
        assert!(error(TensorMap { address: 8, ..MAP }).starts_with("found address 0x8 and strides [1024], expected"));
        assert!(error(TensorMap { tile: &[64, 257], ..MAP }).contains("expected 1 to 256"));
        assert_eq!(
            error(TensorMap { tile: &[128, 16], ..MAP }),
            "found rows of 256 bytes in a tile, expected at most 128"
        );
    }

    #[cfg(feature = "cuda-shim")]
    #[test]
    fn the_plain_form_is_a_struct_of_c() {
        let bytes = MAP.plain();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(8), word(12), word(16)], [0x1000, 2, 2, 1]);
        assert_eq!([word(24), word(32), word(40)], [512, 7, 0], "sizes");
        assert_eq!([word(56), word(64), word(72)], [0, 1024, 0], "strides");
        assert_eq!([word(88), word(92), word(96)], [64, 16, 0], "tile");
    }
}
