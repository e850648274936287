//! Tensor maps of the operands, in the device's memory.

use conclave_kernels::cuda::{Element, sm90::maps};

use crate::{driver::Memory, support::Rig};

/// Rows of `inner` elements, one after the other; tiles of `rows` rows and 128 bytes.
pub(crate) fn rows(rig: &Rig, address: u64, element: Element, shape: (usize, usize), rows: u32) -> Memory {
    rig.upload(&maps::rows(&rig.driver, address, element, shape, rows).unwrap())
}

/// Rows of `heads` heads of `inner` elements.
pub(crate) fn heads(rig: &Rig, address: u64, shape: (usize, usize, usize)) -> Memory {
    rig.upload(&maps::heads(&rig.driver, address, shape).unwrap())
}

/// Two matrices `[outputs, inner]`, and whether the second comes first.
pub(crate) fn pair(rig: &Rig, both: [u64; 2], element: Element, shape: (usize, usize)) -> (Memory, bool) {
    let (map, exchanged) = maps::pair(&rig.driver, both, element, shape).unwrap();
    (rig.upload(&map), exchanged)
}

/// Scales f32 `[blocks, pitch]` of `tokens` tokens.
pub(crate) fn scales(rig: &Rig, address: u64, shape: (usize, usize, usize)) -> Memory {
    rig.upload(&maps::scales(&rig.driver, address, shape).unwrap())
}
