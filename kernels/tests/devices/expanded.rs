//! Attention over expanded keys and values beside the absorbed one.

use conclave_kernels::{Cpu, Device, LatentWrite, Pool, StepRows};

use crate::{
    agreement::compare,
    support::{Case, Model, Numbers, batch, bits, buffer, instruction_sets, output, rows},
};

/// Positions of the long sequence that were computed before, and its rows in the step: over the end of a split and over one
/// that is not whole.
const BEFORE: usize = 400;
const ROWS: usize = 230;

/// Queries, attention and values of a step of three sequences, the second of which is long: `[T, n · dv]`.
fn attend(device: &Cpu, case: &Case, model: &Model<Cpu>, expand: bool) -> Vec<f32> {
    let (shape, mut numbers) = (case.shape, Numbers::new(9));
    let blocks: Vec<u32> = (0..10).rev().collect();
    let (first, last) = ([10], [11]);
    let mut cache = device.new_cache(2, 12, &shape).unwrap();
    for (positions, blocks) in [(0..BEFORE + ROWS, &blocks[..]), (0..3, &first), (0..5, &last)] {
        let kv = buffer(device, &numbers.vector(positions.len() * shape.cached(), 2.0));
        let write = LatentWrite { layer: 1, kv: &kv, gain: &model.latent_gain };
        device.write_latents(&model.mla, &batch(device, rows::<Cpu>(positions, blocks)), &write, &mut cache);
    }
    let mut step = StepRows::default();
    step.push(&[0], 2, &first, Cpu::BLOCK);
    step.push(&[0; ROWS], BEFORE, &blocks, Cpu::BLOCK);
    step.push(&[0; 2], 3, &last, Cpu::BLOCK);
    if expand {
        step.expand();
    }
    let count = step.len();
    let q = buffer(device, &numbers.vector(count * shape.heads * (shape.nope + shape.rope), 1.0));
    let (step, layer) = (batch(device, step), (&cache, 1));
    let (mut absorbed, mut latents) = (Vec::new(), Vec::new());
    device.mla_queries(&model.mla, &step, &q, &model.uk, &mut absorbed);
    device.mla_attention(&model.mla, &step, layer, &absorbed, &mut latents);
    output(device, count * shape.heads * shape.value, |out| {
        device.mla_values(&model.mla, &step, &latents, &model.uv, out);
        device.mla_expanded(&model.mla, &step, layer, &q, &model.kv_b, out);
    })
}

#[test]
fn expanded_attention_is_near_the_absorbed_one_and_leaves_short_spans_as_they_are() {
    for case in [Case::odd(), Case::even()] {
        for isa in instruction_sets() {
            let device = Cpu::new(Pool::new(2).unwrap(), Some(isa)).unwrap();
            let model = case.load(&device);
            let (absorbed, expanded) = (attend(&device, &case, &model, false), attend(&device, &case, &model, true));
            let width = case.shape.heads * case.shape.value;
            let long = width..width * (1 + ROWS);
            assert_eq!(bits(&absorbed[..long.start]), bits(&expanded[..long.start]), "{isa}: the first sequence");
            assert_eq!(bits(&absorbed[long.end..]), bits(&expanded[long.end..]), "{isa}: the last sequence");
            let (absorbed, expanded) = (absorbed[long.clone()].to_vec(), expanded[long].to_vec());
            assert_ne!(absorbed, expanded, "{isa}: another way of computing");
            compare(&[("expanded", expanded)], &[("expanded", absorbed)], 1e-2);
        }
    }
}
