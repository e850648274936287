//! Grouped products, with weights in bf16 and in FP8.

use conclave_kernels::cuda::plain::{GroupedLinear, GroupedLinearFp8};
use proptest::prelude::*;

use crate::{
    driver::Memory,
    linear::chain,
    support::{Numbers, Rig, run},
};

/// Rows of each group, inputs, outputs.
#[derive(Debug, Clone)]
struct Case {
    rows: Vec<usize>,
    inner: usize,
    outputs: usize,
}

impl Case {
    fn offsets(&self) -> Vec<u32> {
        let ends = self.rows.iter().scan(0, |sum, rows| {
            *sum += *rows as u32;
            Some(*sum)
        });
        [0].into_iter().chain(ends).collect()
    }

    /// The group of each row.
    fn groups(&self) -> Vec<usize> {
        self.rows.iter().enumerate().flat_map(|(group, rows)| std::iter::repeat_n(group, *rows)).collect()
    }

    fn largest(&self) -> u32 {
        self.rows.iter().copied().max().unwrap_or(0) as u32
    }
}

/// Each matrix in memory of its own, and their addresses.
fn apart(matrices: Vec<Memory>, rig: &Rig) -> (Vec<Memory>, Memory) {
    let addresses: Vec<u64> = matrices.iter().map(|matrix| rig.at(matrix)).collect();
    let addresses = rig.upload(&addresses);
    (matrices, addresses)
}

fn check_bf16(case: &Case, seed: u64) {
    let Case { rows, inner, outputs } = case;
    let (groups, mut numbers) = (case.groups(), Numbers::new(seed));
    let x = numbers.rounded(groups.len() * inner, 1.0);
    let w: Vec<Vec<f32>> = rows.iter().map(|_| numbers.rounded(outputs * inner, 1.0)).collect();
    let found = run(|rig| {
        let (_matrices, weights) = apart(w.iter().map(|w| rig.upload_bf16(w)).collect(), rig);
        let (x, offsets) = (rig.upload_bf16(&x), rig.upload(&case.offsets()));
        let y = rig.poisoned::<f32>(groups.len() * outputs);
        GroupedLinear {
            x: rig.at(&x),
            weights: rig.at(&weights),
            offsets: rig.at(&offsets),
            y: rig.at(&y),
            inner: *inner as u32,
            outputs: *outputs as u32,
            groups: rows.len() as u32,
            largest: case.largest(),
        }
        .launch(&rig.driver)?;
        Ok(rig.download::<f32>(&y, groups.len() * outputs))
    });
    for (row, (group, x)) in groups.iter().zip(x.chunks_exact(*inner)).enumerate() {
        let expected: Vec<f32> = w[*group].chunks_exact(*inner).map(|w| chain(x, w)).collect();
        assert_eq!(found[row * outputs..][..*outputs], expected, "row {row} of {case:?}");
    }
}

/// The value of e4m3 bits: bias 7, denormals, no infinities.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

fn check_fp8(case: &Case, seed: u64) {
    let Case { rows, inner, outputs } = case;
    let (groups, mut numbers) = (case.groups(), Numbers::new(seed));
    let x = numbers.rounded(groups.len() * inner, 1.0);
    // Every byte but the two that are NaN.
    let mut bytes =
        |count: usize| -> Vec<u8> { (0..count).map(|_| (numbers.below(127) | numbers.below(2) << 7) as u8).collect() };
    let w: Vec<Vec<u8>> = rows.iter().map(|_| bytes(outputs * inner)).collect();
    let blocks = inner.div_ceil(128);
    let scales: Vec<Vec<f32>> = rows.iter().map(|_| numbers.vector(outputs.div_ceil(128) * blocks, 0.1)).collect();
    let found = run(|rig| {
        let (_matrices, weights) = apart(w.iter().map(|w| rig.upload(w)).collect(), rig);
        let (_scales, scales) = apart(scales.iter().map(|scales| rig.upload(scales)).collect(), rig);
        let (x, offsets) = (rig.upload_bf16(&x), rig.upload(&case.offsets()));
        let y = rig.poisoned::<f32>(groups.len() * outputs);
        GroupedLinearFp8 {
            x: rig.at(&x),
            weights: rig.at(&weights),
            scales: rig.at(&scales),
            offsets: rig.at(&offsets),
            y: rig.at(&y),
            inner: *inner as u32,
            outputs: *outputs as u32,
            groups: rows.len() as u32,
            largest: case.largest(),
        }
        .launch(&rig.driver)?;
        Ok(rig.download::<f32>(&y, groups.len() * outputs))
    });
    for (row, (group, x)) in groups.iter().zip(x.chunks_exact(*inner)).enumerate() {
        for output in 0..*outputs {
            let w: Vec<f32> = w[*group][output * inner..][..*inner].iter().map(|bits| e4m3(*bits)).collect();
            let parts = x.chunks(128).zip(w.chunks(128)).map(|(x, w)| chain(x, w));
            let scales = &scales[*group][output / 128 * blocks..];
            let expected = parts.zip(scales).fold(0f32, |sum, (part, scale)| scale.mul_add(part, sum));
            assert_eq!(found[row * outputs + output], expected, "row {row}, output {output} of {case:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn groups_have_matrices_of_their_own(
        rows in prop::collection::vec(prop_oneof![Just(0usize), 1usize..20], 1..5),
        inner in 1usize..150,
        outputs in 1usize..140,
        seed: u64,
    ) {
        let case = Case { rows, inner, outputs };
        check_bf16(&case, seed);
        check_fp8(&case, seed);
    }
}

#[test]
fn scales_change_at_their_blocks() {
    check_fp8(&Case { rows: vec![1, 0, 17], inner: 300, outputs: 130 }, 1);
    check_fp8(&Case { rows: vec![3], inner: 256, outputs: 128 }, 2);
}

#[test]
fn no_rows_launch_nothing() {
    check_bf16(&Case { rows: vec![0, 0], inner: 8, outputs: 8 }, 1);
}
