//! Tensor maps of the operands: the table in `cuda/sm90/README.md`.

use crate::cuda::{CudaError, Driver, Element, EncodedMap, TensorMap};

/// Bytes of a row of a tile.
const ROW: usize = 128;
/// Rows that one load of a product's input brings: `PIECE` of `grouped_tiles.cuh`.
pub const INPUT_ROWS: u32 = 16;
/// Rows that one load of weights brings, and one of queries or keys.
pub const TILE_ROWS: u32 = 64;

/// `[total, inner]`, rows one after the other; tiles of `rows` rows and 128 bytes.
///
/// # Errors
/// As [`Driver::tensor_map`], here and below.
pub fn rows<D: Driver>(
    driver: &D,
    address: u64,
    element: Element,
    (total, inner): (usize, usize),
    rows: u32,
) -> Result<EncodedMap, CudaError> {
    let (dims, strides) = ([inner as u64, total as u64], [(inner * element.size()) as u64]);
    let tile = [(ROW / element.size()) as u32, rows];
    driver.tensor_map(&TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true })
}

/// Inputs of products of heads, bf16 `[rows, heads, inner]`; tiles of 16 rows of one head.
pub fn heads<D: Driver>(
    driver: &D,
    address: u64,
    (rows, heads, inner): (usize, usize, usize),
) -> Result<EncodedMap, CudaError> {
    let element = Element::Bf16;
    let head = (inner * element.size()) as u64;
    // The kernel's loads are of four dimensions; there is one of the last.
    let row = head * heads as u64;
    let (dims, strides) = ([inner as u64, heads as u64, rows as u64, 1], [head, row, row]);
    let tile = [(ROW / element.size()) as u32, 1, INPUT_ROWS, 1];
    driver.tensor_map(&TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true })
}

/// Two matrices `[outputs, inner]`, by turns of eight rows; tiles of 32 rows of each. Gives the map and whether the second
/// comes first in it: strides cannot be negative, so that goes by where they lie.
pub fn pair<D: Driver>(
    driver: &D,
    [first, second]: [u64; 2],
    element: Element,
    (outputs, inner): (usize, usize),
) -> Result<(EncodedMap, bool), CudaError> {
    let pitch = (inner * element.size()) as u64;
    let (address, apart) = (first.min(second), first.abs_diff(second));
    let (dims, strides) = ([inner as u64, 8, 2, outputs as u64 / 8], [pitch, apart, pitch * 8]);
    let tile = [(ROW / element.size()) as u32, 8, 2, 4];
    let map = TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true };
    Ok((driver.tensor_map(&map)?, second < first))
}

/// Scales of activations f32 `[blocks, pitch]` of `tokens` tokens; tiles of 32 tokens.
pub fn scales<D: Driver>(
    driver: &D,
    address: u64,
    (blocks, tokens, pitch): (usize, usize, usize),
) -> Result<EncodedMap, CudaError> {
    let element = Element::F32;
    let (dims, strides, tile) = ([tokens as u64, blocks as u64], [(element.size() * pitch) as u64], [32, 1]);
    driver.tensor_map(&TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: false })
}
