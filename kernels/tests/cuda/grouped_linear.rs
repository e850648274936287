//! Grouped products.

use conclave_kernels::cuda::plain::GroupedLinear;
use proptest::prelude::*;

use crate::{
    driver::Memory,
    linear::chain,
    support::{Numbers, Rig, run},
};

/// Rows of each group, inputs, outputs.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) rows: Vec<usize>,
    pub(crate) inner: usize,
    pub(crate) outputs: usize,
}

impl Case {
    pub(crate) fn offsets(&self) -> Vec<u32> {
        let ends = self.rows.iter().scan(0, |sum, rows| {
            *sum += *rows as u32;
            Some(*sum)
        });
        [0].into_iter().chain(ends).collect()
    }

    /// The group of each row.
    pub(crate) fn groups(&self) -> Vec<usize> {
        self.rows.iter().enumerate().flat_map(|(group, rows)| std::iter::repeat_n(group, *rows)).collect()
    }

    pub(crate) fn largest(&self) -> u32 {
        self.rows.iter().copied().max().unwrap_or(0) as u32
    }
}

/// Each matrix in memory of its own, and their addresses.
pub(crate) fn apart(matrices: Vec<Memory>, rig: &Rig) -> (Vec<Memory>, Memory) {
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
    }
}

#[test]
fn no_rows_launch_nothing() {
    check_bf16(&Case { rows: vec![0, 0], inner: 8, outputs: 8 }, 1);
}
