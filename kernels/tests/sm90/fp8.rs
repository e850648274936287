//! Grouped products in FP8: weights with a scale for each 128 x 128 block, activations with one for each token and 128 elements.

use conclave_kernels::cuda::{
    Element,
    sm90::{
        GroupedProductFp8, Quantize, Tokens,
        maps::{INPUT_ROWS, TILE_ROWS},
    },
};

use crate::{
    each::on_each,
    grouped::Case,
    maps,
    support::{Numbers, Rig, assert_close},
};

/// Tokens of a tile that there are kernels for.
const TOKENS: [Tokens; 3] = [Tokens::T16, Tokens::T64, Tokens::T128];

/// The value of an e4m3 byte that is not NaN.
fn value(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if byte > 127 { -magnitude } else { magnitude }
}

/// Bytes of magnitude up to 4 or so.
fn bytes(numbers: &mut Numbers, length: usize) -> Vec<u8> {
    (0..length).map(|_| (numbers.below(2) << 7 | numbers.below(73)) as u8).collect()
}

struct Operands {
    /// `[P, inner]`, and scales `[blocks, pitch]`
    x: Vec<u8>,
    x_scales: Vec<f32>,
    pitch: usize,
    /// Each group's `[outputs, inner]`, twice where gated, and scales `[blocks of outputs, blocks]`, twice likewise
    weights: Vec<Vec<u8>>,
    scales: Vec<Vec<f32>>,
}

impl Operands {
    fn new(case: &Case<'_>, copies: usize) -> Self {
        let mut numbers = Numbers::new(case.inner as u64 + 1);
        let (blocks, pitch) = (case.inner.div_ceil(128), case.total().next_multiple_of(4));
        let of = case.outputs.div_ceil(128) * blocks * copies;
        let mut scales = |length| numbers.vector(length, 0.5).into_iter().map(f32::abs).collect::<Vec<f32>>();
        let (x_scales, block_scales) = (scales(blocks * pitch), case.rows.iter().map(|_| scales(of)).collect());
        let weights = case.rows.iter().map(|_| bytes(&mut numbers, case.outputs * copies * case.inner)).collect();
        Self { x: bytes(&mut numbers, case.total() * case.inner), x_scales, pitch, weights, scales: block_scales }
    }

    /// Output `output` of gate (`copy` 0) or up (1) for one row.
    fn dot(&self, case: &Case<'_>, (group, row): (usize, usize), copy: usize, output: usize) -> f64 {
        let blocks = case.inner.div_ceil(128);
        let block = copy * case.outputs.div_ceil(128) + output / 128;
        let at = (copy * case.outputs + output) * case.inner;
        let term = |k: usize| {
            let scale = self.x_scales[k / 128 * self.pitch + row] * self.scales[group][block * blocks + k / 128];
            value(self.x[row * case.inner + k]) * value(self.weights[group][at + k]) * f64::from(scale)
        };
        (0..case.inner).map(term).sum()
    }

    /// Bytes from the scales of a gate to those of its up.
    fn up_at(&self, case: &Case<'_>) -> u64 {
        (case.outputs.div_ceil(128) * case.inner.div_ceil(128) * size_of::<f32>()) as u64
    }

    fn expected(&self, case: &Case<'_>, copies: usize) -> Vec<f64> {
        let groups = case.rows.iter().enumerate().flat_map(|(group, rows)| vec![group; *rows as usize]);
        let rows: Vec<(usize, usize)> = groups.enumerate().map(|(row, group)| (group, row)).collect();
        let value = |row, output| {
            let first = self.dot(case, row, 0, output);
            if copies == 1 { first } else { first / (1.0 + (-first).exp()) * self.dot(case, row, 1, output) }
        };
        rows.into_iter().flat_map(|row| (0..case.outputs).map(move |output| value(row, output))).collect()
    }
}

/// What is multiplied, and where ups lie.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Linear,
    UpBehindGate,
    GateBehindUp,
}

fn multiply(tokens: Tokens, case: &Case<'_>, operands: &Operands, kind: Kind) -> Vec<(&'static str, Vec<f32>)> {
    let (total, shape, gated) = (case.total(), (case.outputs, case.inner), kind != Kind::Linear);
    let half = case.outputs * case.inner;
    let length = total * case.outputs;
    let (groups, inner, outputs, blocks) = (case.rows.len() as u32, case.inner as u32, case.outputs as u32, 3);
    on_each(|rig| {
        let (x, x_scales) = (rig.upload(&operands.x), rig.upload(&operands.x_scales));
        let stored = |weights: &Vec<u8>| match kind {
            Kind::GateBehindUp => rig.upload(&[&weights[half..], &weights[..half]].concat()),
            Kind::Linear | Kind::UpBehindGate => rig.upload(weights),
        };
        let weights: Vec<_> = operands.weights.iter().map(stored).collect();
        let scales: Vec<_> = operands.scales.iter().map(|scales| rig.upload(scales)).collect();
        let map = |at| match kind {
            Kind::Linear => (maps::rows(rig, at, Element::E4m3, shape, TILE_ROWS), false),
            Kind::UpBehindGate => maps::pair(rig, [at, at + half as u64], Element::E4m3, shape),
            Kind::GateBehindUp => maps::pair(rig, [at + half as u64, at], Element::E4m3, shape),
        };
        let maps: Vec<_> = weights.iter().map(|weights| map(rig.at(weights))).collect();
        let entry = |(map, exchanged): &(_, bool)| rig.at(map) + u64::from(*exchanged);
        let weights_at = rig.upload(&maps.iter().map(entry).collect::<Vec<u64>>());
        let of_gates: Vec<u64> = scales.iter().map(|scales| rig.at(scales)).collect();
        let of_ups: Vec<u64> = of_gates.iter().map(|at| at + operands.up_at(case)).collect();
        let (scales_at, up_scales_at) = (rig.upload(&of_gates), rig.upload(&of_ups));
        let x_map = maps::rows(rig, rig.at(&x), Element::E4m3, (total, case.inner), INPUT_ROWS);
        let scales_map = maps::scales(rig, rig.at(&x_scales), (case.inner.div_ceil(128), total, operands.pitch));
        let offsets = rig.upload(&case.offsets());
        let out = if gated { rig.poisoned::<u16>(length) } else { rig.poisoned::<f32>(length) };
        let at = [&x_map, &scales_map, &weights_at, &scales_at, &up_scales_at, &offsets, &out];
        let [x, x_scales, weights, scales, up_scales, begin, y] = at.map(|memory| rig.at(memory));
        // Of one group, the rows say where it ends.
        let (begin, end, rows) = if groups == 1 { (0, 0, total as u32) } else { (begin, begin + 4, 0) };
        GroupedProductFp8 {
            x,
            x_scales,
            weights,
            scales,
            up_scales,
            begin,
            end,
            y,
            rows,
            groups,
            inner,
            outputs,
            gated,
            tokens,
            blocks,
        }
        .launch(&rig.driver)?;
        Ok(if gated { rig.download_bf16(&out, length) } else { rig.download(&out, length) })
    })
}

#[test]
fn scaled_products_are_near_their_definition() {
    let cases = [
        Case { rows: &[0, 3, 17, 1, 40], inner: 272, outputs: 72 },
        Case { rows: &[130, 0, 33], inner: 128, outputs: 200 },
        Case { rows: &[21], inner: 160, outputs: 136 },
    ];
    for case in cases {
        for copies in [1, 2] {
            let operands = Operands::new(&case, copies);
            let expected = operands.expected(&case, copies);
            for tokens in TOKENS {
                let kind = if copies == 1 { Kind::Linear } else { Kind::UpBehindGate };
                for (on, found) in multiply(tokens, &case, &operands, kind) {
                    // The sums of e4m3 products of tensor cores keep some 14 bits.
                    let limit = if on == "GPU" { 2e-3 } else { 1e-5 } + if copies == 1 { 0.0 } else { 1.0 / 256.0 };
                    assert_close(&found, &expected, limit, &format!("{on} {tokens:?} {} x {copies}", case.inner));
                }
            }
        }
    }
}

#[test]
fn gates_and_ups_keep_their_scales_whichever_comes_first() {
    let case = Case { rows: &[5, 0, 18], inner: 272, outputs: 136 };
    let operands = Operands::new(&case, 2);
    for tokens in TOKENS {
        let [behind, before] =
            [Kind::UpBehindGate, Kind::GateBehindUp].map(|kind| multiply(tokens, &case, &operands, kind));
        assert!(behind == before, "{tokens:?}");
    }
}

#[test]
fn activations_are_rounded_to_the_nearest_of_their_scale() {
    let (rows, inner, pitch) = (5, 200, 8);
    let mut x = Numbers::new(6).rounded(rows * inner, 30.0);
    x[inner..2 * inner].fill(0.0);
    let blocks = usize::div_ceil(inner, 128);
    let quantized = |rig: &Rig| {
        let (x, out) = (rig.upload_bf16(&x), rig.poisoned::<u8>(rows * inner));
        let scales = rig.poisoned::<f32>(blocks * pitch);
        let [x, out_at, scales_at] = [&x, &out, &scales].map(|memory| rig.at(memory));
        let (rows_count, inner_count, pitch_count) = (rows as u32, inner as u32, pitch as u32);
        Quantize { x, out: out_at, scales: scales_at, rows: rows_count, inner: inner_count, pitch: pitch_count }
            .launch(&rig.driver)?;
        let (out, scales) = (rig.download::<u8>(&out, rows * inner), rig.download::<f32>(&scales, blocks * pitch));
        Ok([out, bytemuck::cast_slice(&scales).to_vec()].concat())
    };
    for (on, found) in on_each(quantized) {
        let (out, scales) = found.split_at(rows * inner);
        for (at, (x, byte)) in x.iter().zip(out).enumerate() {
            let (row, block) = (at / inner, at % inner / 128);
            let scale: f32 = bytemuck::pod_read_unaligned(&scales[(block * pitch + row) * 4..][..4]);
            let back = value(*byte) * f64::from(scale);
            // Half a step of three bits, or of the smallest steps.
            let limit = f64::from(x.abs()) / 16.0 + f64::from(scale) / 1024.0;
            assert!((back - f64::from(*x)).abs() <= limit * 1.0001, "{on}: at {at}: {back} for {x}");
        }
    }
}
