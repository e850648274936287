//! Products in FP8, and what rounds their rows.

use conclave_kernels::cuda::plain::{GroupedLinearFp8, LinearFp8, Quantize};
use proptest::prelude::*;

use crate::{
    grouped_linear::{Case, apart},
    linear::chain,
    support::{Numbers, Rig, run},
};

/// The value of e4m3 bits: bias 7, denormals, no infinities.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

/// The bits of the nearest value, of two as near the one with an even last bit; the largest where it is beyond.
fn nearest(x: f32) -> u8 {
    let distance = |bits: &u8| (f64::from(e4m3(*bits)) - f64::from(x.abs())).abs();
    let order = |a: &u8, b: &u8| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)));
    let magnitude = (0..0x7fu8).min_by(order).unwrap();
    if x.is_sign_negative() { magnitude | 0x80 } else { magnitude }
}

/// Operands of a case in blocks of `height` x `width`.
struct Operands {
    height: usize,
    width: usize,
    pitch: usize,
    x: Vec<u8>,
    x_scales: Vec<f32>,
    w: Vec<Vec<u8>>,
    scales: Vec<Vec<f32>>,
}

impl Operands {
    fn new(case: &Case, (height, width): (usize, usize), seed: u64) -> Self {
        let (total, mut numbers) = (case.groups().len(), Numbers::new(seed));
        // Every byte but the two that are NaN.
        let mut bytes = |count: usize| -> Vec<u8> {
            (0..count).map(|_| (numbers.below(127) | numbers.below(2) << 7) as u8).collect()
        };
        let x = bytes(total * case.inner);
        let w = case.rows.iter().map(|_| bytes(case.outputs * case.inner)).collect();
        let (blocks, pitch) = (case.inner.div_ceil(width), total + 3);
        let x_scales = numbers.vector(blocks * pitch, 0.1);
        let scales = case.rows.iter().map(|_| numbers.vector(case.outputs.div_ceil(height) * blocks, 0.1)).collect();
        Self { height, width, pitch, x, x_scales, w, scales }
    }

    fn expected(&self, case: &Case, row: usize, group: usize, output: usize) -> f32 {
        let (inner, blocks) = (case.inner, case.inner.div_ceil(self.width));
        let of = |bytes: &[u8]| bytes.iter().map(|bits| e4m3(*bits)).collect::<Vec<f32>>();
        let (x, w) = (of(&self.x[row * inner..][..inner]), of(&self.w[group][output * inner..][..inner]));
        let parts = x.chunks(self.width).zip(w.chunks(self.width)).map(|(x, w)| chain(x, w));
        parts.enumerate().fold(0f32, |sum, (block, part)| {
            let scale =
                self.x_scales[block * self.pitch + row] * self.scales[group][output / self.height * blocks + block];
            scale.mul_add(part, sum)
        })
    }
}

fn grouped(rig: &Rig, case: &Case, of: &Operands) -> Vec<f32> {
    let (_matrices, weights) = apart(of.w.iter().map(|w| rig.upload(w)).collect(), rig);
    let (_scales, scales) = apart(of.scales.iter().map(|scales| rig.upload(scales)).collect(), rig);
    let (x, x_scales, offsets) = (rig.upload(&of.x), rig.upload(&of.x_scales), rig.upload(&case.offsets()));
    let total = case.groups().len();
    let y = rig.poisoned::<f32>(total * case.outputs);
    GroupedLinearFp8 {
        x: rig.at(&x),
        x_scales: rig.at(&x_scales),
        weights: rig.at(&weights),
        scales: rig.at(&scales),
        offsets: rig.at(&offsets),
        y: rig.at(&y),
        inner: case.inner as u32,
        outputs: case.outputs as u32,
        pitch: of.pitch as u32,
        height: of.height as u32,
        width: of.width as u32,
        groups: case.rows.len() as u32,
        largest: case.largest(),
    }
    .launch(&rig.driver)
    .unwrap();
    rig.download::<f32>(&y, total * case.outputs)
}

/// The rows of the first group alone.
fn single(rig: &Rig, case: &Case, of: &Operands) -> Vec<f32> {
    let (rows, outputs) = (case.rows[0], case.outputs);
    let (x, x_scales) = (rig.upload(&of.x), rig.upload(&of.x_scales));
    let (w, scales, y) = (rig.upload(&of.w[0]), rig.upload(&of.scales[0]), rig.poisoned::<f32>(rows * outputs));
    LinearFp8 {
        x: rig.at(&x),
        x_scales: rig.at(&x_scales),
        w: rig.at(&w),
        scales: rig.at(&scales),
        y: rig.at(&y),
        rows: rows as u32,
        inner: case.inner as u32,
        outputs: outputs as u32,
        pitch: of.pitch as u32,
        height: of.height as u32,
        width: of.width as u32,
    }
    .launch(&rig.driver)
    .unwrap();
    rig.download::<f32>(&y, rows * outputs)
}

fn check(case: &Case, block: (usize, usize), seed: u64) {
    let of = Operands::new(case, block, seed);
    let found = run(|rig| Ok(grouped(rig, case, &of)));
    for (row, group) in case.groups().into_iter().enumerate() {
        for output in 0..case.outputs {
            let expected = of.expected(case, row, group, output);
            let found = found[row * case.outputs + output];
            assert_eq!(found, expected, "row {row}, output {output} of {case:?} in blocks of {block:?}");
        }
    }
    let alone = run(|rig| Ok(single(rig, case, &of)));
    assert_eq!(alone, found[..alone.len()], "the first group of {case:?} alone");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn blocks_of_any_size_have_their_scales(
        rows in prop::collection::vec(prop_oneof![Just(0usize), 1usize..20], 1..5),
        inner in 1usize..150,
        outputs in 1usize..140,
        height in 1usize..150,
        width in 1usize..150,
        seed: u64,
    ) {
        check(&Case { rows, inner, outputs }, (height, width), seed);
    }
}

#[test]
fn scales_change_at_their_blocks() {
    check(&Case { rows: vec![1, 0, 17], inner: 300, outputs: 130 }, (128, 128), 1);
    check(&Case { rows: vec![3], inner: 256, outputs: 128 }, (128, 128), 2);
    check(&Case { rows: vec![2, 5], inner: 90, outputs: 70 }, (32, 16), 3);
}

/// Rows of `x` as the kernel rounds them: bytes, and scales `[blocks, pitch]`.
fn quantized(x: &[f32], inner: usize, width: usize, pitch: usize) -> (Vec<u8>, Vec<f32>) {
    let (rows, blocks) = (x.len() / inner, inner.div_ceil(width));
    let both = run(|rig| {
        let (x, out) = (rig.upload_bf16(x), rig.poisoned::<u8>(x.len()));
        let scales = rig.poisoned::<f32>(blocks * pitch);
        Quantize {
            x: rig.at(&x),
            out: rig.at(&out),
            scales: rig.at(&scales),
            rows: rows as u32,
            inner: inner as u32,
            width: width as u32,
            pitch: pitch as u32,
        }
        .launch(&rig.driver)?;
        let scales = rig.download::<f32>(&scales, blocks * pitch);
        Ok([rig.download::<u8>(&out, rows * inner), bytemuck::cast_slice(&scales).to_vec()].concat())
    });
    let (bytes, scales) = both.split_at(x.len());
    (bytes.to_vec(), scales.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect())
}

#[test]
fn rows_are_rounded_to_the_nearest_in_units_of_their_scale() {
    for (rows, inner, width) in [(5, 200, 128), (3, 37, 16), (9, 130, 64), (1, 5, 8)] {
        let (mut x, pitch) = (Numbers::new(inner as u64).rounded(rows * inner, 30.0), rows + 2);
        // Smaller than the smallest scale is for; nothing at all.
        x[..width.min(inner)].iter_mut().for_each(|x| *x = half::bf16::from_f32(*x * 1e-7).to_f32());
        if rows > 1 {
            x[inner..2 * inner].fill(0.0);
        }
        let (bytes, scales) = quantized(&x, inner, width, pitch);
        for (row, values) in x.chunks_exact(inner).enumerate() {
            for (block, values) in values.chunks(width).enumerate() {
                let largest = values.iter().fold(1e-4f32, |largest, x| largest.max(x.abs()));
                assert_eq!(scales[block * pitch + row], largest / 448.0, "row {row}, block {block}");
                for (at, x) in values.iter().enumerate() {
                    let found = bytes[row * inner + block * width + at];
                    assert_eq!(found, nearest(x * (448.0 / largest)), "row {row}, block {block}, {x} of {largest}");
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_so() {
    let (mut x, inner) = (Numbers::new(3).rounded(4 * 32, 1.0), 32);
    (x[5], x[inner + 20], x[2 * inner]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let (bytes, scales) = quantized(&x, inner, 16, 4);
    let value = |row: usize, at: usize| e4m3_or_nan(bytes[row * inner + at]) * scales[at / 16 * 4 + row];
    assert!(value(0, 5).is_nan() && value(1, 20).is_nan() && value(2, 0).is_nan());
    assert!((0..inner).all(|at| value(3, at).is_finite()));
}

fn e4m3_or_nan(bits: u8) -> f32 {
    if bits & 0x7f == 0x7f { f32::NAN } else { e4m3(bits) }
}
