//! Products of rows with a matrix.

use conclave_kernels::cuda::plain::{GateLogits, Linear};
use proptest::prelude::*;

use crate::support::{Numbers, assert_close, run};

/// The chain that an output is by definition.
pub(crate) fn chain(x: &[f32], w: &[f32]) -> f32 {
    x.iter().zip(w).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum))
}

fn check((rows, inner, outputs): (usize, usize, usize), seed: u64) {
    let mut numbers = Numbers::new(seed);
    let (x, w) = (numbers.vector(rows * inner, 2.0), numbers.rounded(outputs * inner, 1.0));
    let mut rounded = x.clone();
    conclave_kernels::activation::round(conclave_kernels::Dtype::Bf16, &mut rounded);
    let sizes = (rows as u32, inner as u32, outputs as u32);
    let product = |x: &[f32]| -> Vec<f32> {
        x.chunks_exact(inner).flat_map(|x| w.chunks_exact(inner).map(move |w| chain(x, w))).collect()
    };
    let found = run(|rig| {
        let (x, w, y) = (rig.upload_bf16(&x), rig.upload_bf16(&w), rig.poisoned::<f32>(rows * outputs));
        let (x, w, y_at) = (rig.at(&x), rig.at(&w), rig.at(&y));
        Linear { x, w, y: y_at, rows: sizes.0, inner: sizes.1, outputs: sizes.2 }.launch(&rig.driver)?;
        Ok(rig.download::<f32>(&y, rows * outputs))
    });
    assert_eq!(found, product(&rounded), "linear {rows} x {inner} x {outputs}");
    let logits = |x: &[f32]| {
        run(|rig| {
            let rows = x.len() / inner;
            let (x, w, y) = (rig.upload(x), rig.upload_bf16(&w), rig.poisoned::<f32>(rows * outputs));
            let (x, w, y_at) = (rig.at(&x), rig.at(&w), rig.at(&y));
            GateLogits { x, w, y: y_at, rows: rows as u32, inner: sizes.1, outputs: sizes.2 }.launch(&rig.driver)?;
            Ok(rig.download::<f32>(&y, rows * outputs))
        })
    };
    let found = logits(&x);
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
    let expected: Vec<f64> =
        x.chunks_exact(inner).flat_map(|x| w.chunks_exact(inner).map(move |w| dot(x, w))).collect();
    assert_close(&found, &expected, 4e-5, &format!("gate_logits {rows} x {inner} x {outputs}"));
    assert_eq!(logits(&x[..inner]), &found[..outputs], "a row beside others and alone");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn products_are_chains(rows in 1usize..40, inner in 1usize..100, outputs in 1usize..150, seed: u64) {
        check((rows, inner, outputs), seed);
    }
}

#[test]
fn tiles_meet_at_their_edges() {
    for sizes in [(16, 32, 64), (17, 33, 65), (15, 31, 63), (1, 1, 1), (32, 64, 128)] {
        check(sizes, 5);
    }
}
