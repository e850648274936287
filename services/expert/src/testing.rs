//! A small made-up layer for unit tests: four groups of two experts.

use conclave_dispatch::{GateConfig, ModelShape, WeightRule};
use conclave_kernels::{Device, Dtype, Ffn, Pool, Reference, Weight, activation};
use conclave_model::{GateMethod, Scoring};
use conclave_proto::v1::{Activation, ExpertBatch, WorkId};

const HIDDEN: usize = 8;
const INNER: usize = 6;
const GROUPS: usize = 4;
const EXPERTS: usize = 8;

pub(crate) fn shape() -> ModelShape {
    ModelShape {
        hidden: HIDDEN,
        groups: GROUPS,
        moe: vec![false, true],
        gate: GateConfig {
            experts: EXPERTS,
            top_k: 4,
            groups: GROUPS,
            top_groups: 4,
            method: GateMethod::GroupLimitedGreedy,
            scoring: Scoring::Softmax,
            rule: WeightRule::Scaled,
            scale: 1.0,
        },
        bias: vec![Vec::new(); 2],
    }
}

/// Reproducible values in [-1, 1).
pub(crate) fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// The experts' weights on the reference device.
pub(crate) struct Weights {
    pub(crate) device: Reference,
    pub(crate) experts: Vec<Ffn<<Reference as Device>::Matrix>>,
}

impl Weights {
    pub(crate) fn new() -> Self {
        let device = Reference::new(Pool::new(1).unwrap());
        let matrix = |seed: u64, rows: usize, cols: usize| {
            let data = activation::encode(Dtype::F32, &values(seed, rows * cols));
            device.load_matrix(Weight::new(Dtype::F32, &data, rows, cols).unwrap()).unwrap()
        };
        let expert = |e: u64| Ffn {
            gate: matrix(e * 3, INNER, HIDDEN),
            up: matrix(e * 3 + 1, INNER, HIDDEN),
            down: matrix(e * 3 + 2, HIDDEN, INNER),
        };
        let experts = (0..EXPERTS as u64).map(expert).collect();
        Self { device, experts }
    }
}

/// A right batch over `groups`: each row goes to two of their experts, or to all where there are fewer.
pub(crate) fn batch(seed: u64, rows: u32, groups: &[u32]) -> ExpertBatch {
    let all: Vec<u32> = groups.iter().flat_map(|g| [g * 2, g * 2 + 1]).collect();
    let takes =
        |expert: usize, row: u32| (row as u64 + seed + expert as u64).is_multiple_of(all.len().div_ceil(2) as u64);
    let mut batch = ExpertBatch {
        id: Some(WorkId { caller: 1, step: seed, layer: 1, attempt: 0, part: 0 }),
        activation: Activation::F32.into(),
        rows,
        hidden: HIDDEN as u32,
        x: activation::encode(Dtype::F32, &values(seed + 50, rows as usize * HIDDEN)).into(),
        groups: groups.to_vec(),
        ..ExpertBatch::default()
    };
    for (index, expert) in all.iter().enumerate() {
        let before = batch.row_index.len();
        batch.row_index.extend((0..rows).filter(|row| takes(index, *row)));
        if batch.row_index.len() > before {
            batch.experts.push(*expert);
            batch.counts.push((batch.row_index.len() - before) as u32);
        }
    }
    batch.weights = values(seed + 90, batch.row_index.len());
    batch
}

/// Changes one field of a batch.
pub(crate) fn spoil(batch: &mut ExpertBatch, field: usize, value: u32, at: usize) {
    fn put(values: &mut Vec<u32>, value: u32, at: usize) {
        match values.get_mut(at) {
            Some(old) => *old = value,
            None => values.push(value),
        }
    }
    let small = value % 16;
    match field {
        0 => batch.id = None,
        1 => batch.activation = small as i32,
        2 => batch.rows = value,
        3 => batch.hidden = small,
        4 => batch.x = batch.x.slice(..at.min(batch.x.len())),
        5 => put(&mut batch.groups, small, at),
        6 => put(&mut batch.experts, small, at),
        7 => put(&mut batch.counts, if at.is_multiple_of(2) { value } else { small }, at),
        8 => put(&mut batch.row_index, small, at),
        9 => batch.weights.truncate(at),
        10 => batch.weights.iter_mut().take(1).for_each(|weight| *weight = f32::from_bits(value)),
        _ => batch.groups.truncate(at),
    }
}
