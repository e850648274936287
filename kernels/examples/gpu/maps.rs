//! Tensor maps: the table in `cuda/sm90/README.md`.

use conclave_kernels::cuda::{CudaError, Driver, Element, EncodedMap, TensorMap};

/// Rows of `inner` elements, one after the other; tiles of `rows` rows and 128 bytes.
pub(crate) fn rows<D: Driver>(
    driver: &D,
    (address, element): (u64, Element),
    (total, inner): (usize, usize),
    rows: u32,
) -> Result<EncodedMap, CudaError> {
    let (dims, strides) = ([inner as u64, total as u64], [(inner * element.size()) as u64]);
    let tile = [(128 / element.size()) as u32, rows];
    driver.tensor_map(&TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true })
}

/// Gate `[outputs, inner]` and up after it, by turns of eight rows: tiles of 32 rows of each.
pub(crate) fn gated<D: Driver>(
    driver: &D,
    (address, element): (u64, Element),
    (outputs, inner): (usize, usize),
) -> Result<EncodedMap, CudaError> {
    let pitch = (inner * element.size()) as u64;
    let (dims, strides) = ([inner as u64, 8, 2, outputs as u64 / 8], [pitch, pitch * outputs as u64, pitch * 8]);
    let tile = [(128 / element.size()) as u32, 8, 2, 4];
    driver.tensor_map(&TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true })
}

/// Scales f32 `[blocks, pitch]` of `tokens` tokens; tiles of 32 tokens.
pub(crate) fn scales<D: Driver>(
    driver: &D,
    address: u64,
    (blocks, tokens, pitch): (usize, usize, usize),
) -> Result<EncodedMap, CudaError> {
    let (dims, strides, tile) = ([tokens as u64, blocks as u64], [4 * pitch as u64], [32, 1]);
    let element = Element::F32;
    driver.tensor_map(&TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: false })
}
