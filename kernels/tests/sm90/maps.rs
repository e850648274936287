//! Tensor maps of the operands, in the device's memory: the table in `cuda/sm90/README.md`.

use conclave_kernels::cuda::{Driver, Element, TensorMap};

use crate::{driver::Memory, support::Rig};

/// Rows of `inner` elements, one after the other; tiles of `rows` rows and 128 bytes.
pub(crate) fn rows(rig: &Rig, address: u64, element: Element, (total, inner): (usize, usize), rows: u32) -> Memory {
    let (dims, strides) = ([inner as u64, total as u64], [(inner * element.size()) as u64]);
    let tile = [(128 / element.size()) as u32, rows];
    upload(rig, &TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true })
}

/// Gate `[outputs, inner]` and up after it, by turns of eight rows: tiles of 32 rows of each.
pub(crate) fn gated(rig: &Rig, address: u64, element: Element, (outputs, inner): (usize, usize)) -> Memory {
    let pitch = (inner * element.size()) as u64;
    let (dims, strides) = ([inner as u64, 8, 2, outputs as u64 / 8], [pitch, pitch * outputs as u64, pitch * 8]);
    let tile = [(128 / element.size()) as u32, 8, 2, 4];
    upload(rig, &TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: true })
}

/// Scales f32 `[blocks, pitch]` of `tokens` tokens; tiles of 32 tokens.
pub(crate) fn scales(rig: &Rig, address: u64, (blocks, tokens, pitch): (usize, usize, usize)) -> Memory {
    let (dims, strides, tile) = ([tokens as u64, blocks as u64], [4 * pitch as u64], [32, 1]);
    let element = Element::F32;
    upload(rig, &TensorMap { address, element, dims: &dims, strides: &strides, tile: &tile, swizzle: false })
}

fn upload(rig: &Rig, map: &TensorMap<'_>) -> Memory {
    rig.upload(&rig.driver.tensor_map(map).unwrap())
}
