//! Does the device compute what the definition says, with the weights as they lie in memory?

use conclave_dispatch::ModelShape;
use conclave_kernels::{Device, Dtype, ExpertRows, Fp8Weights, Pool, Reference, activation};
use conclave_model::{
    Checkpoint,
    names::{self, FfnNames},
};

use crate::cells::{self, Cell};
use crate::error::ExpertError;

const ROWS: usize = 3;

/// Runs every expert of one of the cell's layers on a few rows: finite, and for one expert as the definition has it.
pub(crate) fn check<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    shape: &ModelShape,
    cell: &Cell<D::Matrix>,
) -> Result<(), ExpertError> {
    let group = cell.id.group.index();
    let layers: Vec<usize> = (0..shape.moe.len()).filter(|layer| shape.moe[*layer]).collect();
    let Some(&layer) = layers.get(group % layers.len().max(1)) else { return Ok(()) };
    let first = group * shape.group_size();
    let mut x = samples(group as u64, ROWS * shape.hidden);
    activation::round(device.activation(), &mut x);
    let bytes = activation::encode(device.activation(), &x);
    let compared = first + group % shape.group_size();
    for expert in first..first + shape.group_size() {
        let Some(ffn) = cell.expert(layer as u32, expert as u32) else { continue };
        let mut found = vec![0f32; x.len()];
        let rows: Vec<u32> = (0..ROWS as u32).collect();
        let expert_rows = ExpertRows { ffn, rows: &rows, weights: &[1.0; ROWS], slots: &rows };
        device.grouped_ffn(&[&bytes], &[expert_rows], &mut found)?;
        if found.iter().any(|value| !value.is_finite()) {
            return Err(ExpertError::NotFinite { cell: cell.id, layer });
        }
        if expert == compared {
            let tolerance = tolerance(device, checkpoint, &names::layer(layer).expert(expert));
            compare(&definition(checkpoint, cell, layer, expert, x.clone())?, &found, tolerance).map_err(
                |(found, expected)| ExpertError::Disagrees { cell: cell.id, layer, expert, found, expected },
            )?;
        }
    }
    Ok(())
}

/// The same expert on the reference device, from the checkpoint's bytes.
fn definition<M>(
    checkpoint: &Checkpoint,
    cell: &Cell<M>,
    layer: usize,
    expert: usize,
    x: Vec<f32>,
) -> Result<Vec<f32>, ExpertError> {
    let reference = Reference::new(Pool::new(1)?);
    let ffn = cells::load_expert(&reference, checkpoint, cell.id, &names::layer(layer).expert(expert))?;
    let mut expected = Vec::new();
    reference.ffn(&x, &ffn, &mut expected);
    Ok(expected)
}

/// How far results may be off, as a part of the largest. Where the device multiplies in FP8 it rounds to that what weights are
/// multiplied by, too: each product is then off by 2.6 % in the mean square, a block by 5 %, and the worst of many by a multiple of it.
fn tolerance<D: Device>(device: &D, checkpoint: &Checkpoint, expert: &FfnNames) -> f32 {
    let tensors = [expert.gate_proj(), expert.up_proj(), expert.down_proj()];
    let in_fp8 = |name: &String| checkpoint.weight(name).is_ok_and(|weight| weight.scales.is_some());
    match device.activation() {
        Dtype::F32 => 1e-4,
        Dtype::Bf16 if device.fp8_weights() == Fp8Weights::Multiplied && tensors.iter().any(in_fp8) => 0.2,
        Dtype::Bf16 => 3e-2,
    }
}

/// The error holds the largest difference and the tolerance, both as a part of the largest value.
fn compare(expected: &[f32], found: &[f32], tolerance: f32) -> Result<(), (f32, f32)> {
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |most, value| most.max(value.abs()));
    let difference = expected.iter().zip(found).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    if difference / largest > tolerance { Err((difference / largest, tolerance)) } else { Ok(()) }
}

/// Values in [-1, 1), the same ones for the same seed (a 64-bit linear congruential generator, upper bits).
fn samples(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}
