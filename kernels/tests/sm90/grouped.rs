//! Grouped products in bf16.

use conclave_kernels::cuda::{Arg, CudaError, Driver, Element, Launch};

use crate::{
    each::{on_each, same_bits},
    maps,
    support::{Numbers, Rig, assert_close},
};

/// Threads and dynamic shared memory of `sm90_grouped_linear_{tokens}` and `sm90_grouped_gated_{tokens}`.
pub(crate) const KERNELS: [(u32, u32, u32); 4] =
    [(16, 256, 86_148), (64, 256, 102_500), (128, 384, 200_804), (256, 384, 200_772)];

/// Rows of each group, inner dimension, outputs.
pub(crate) struct Case<'a> {
    pub(crate) rows: &'a [u32],
    pub(crate) inner: usize,
    pub(crate) outputs: usize,
}

impl Case<'_> {
    pub(crate) fn offsets(&self) -> Vec<u32> {
        let sums = self.rows.iter().scan(0, |sum, rows| {
            *sum += rows;
            Some(*sum)
        });
        std::iter::once(0).chain(sums).collect()
    }

    pub(crate) fn total(&self) -> usize {
        self.rows.iter().sum::<u32>() as usize
    }
}

/// Activations `[P, inner]` and each group's weights `[outputs, inner]`, or `[2 · outputs, inner]`: gate and up.
struct Operands {
    x: Vec<f32>,
    weights: Vec<Vec<f32>>,
}

impl Operands {
    fn new(case: &Case<'_>, gated: bool) -> Self {
        let mut numbers = Numbers::new(case.inner as u64);
        let rows = case.outputs * if gated { 2 } else { 1 };
        Self {
            x: numbers.rounded(case.total() * case.inner, 1.0),
            weights: case.rows.iter().map(|_| numbers.rounded(rows * case.inner, 0.3)).collect(),
        }
    }

    /// By definition, in f64.
    fn expected(&self, case: &Case<'_>, gated: bool) -> Vec<f64> {
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        let groups = (case.rows.iter().zip(&self.weights)).flat_map(|(rows, w)| vec![w; *rows as usize]);
        let rows = self.x.chunks_exact(case.inner).zip(groups);
        rows.flat_map(|(x, w)| {
            let (first, second) = w.split_at(case.outputs * case.inner);
            let up = second.chunks_exact(case.inner).map(|w| dot(x, w)).collect::<Vec<_>>();
            let first = first.chunks_exact(case.inner).map(|w| dot(x, w)).enumerate();
            let value = |(at, y): (usize, f64)| if gated { y / (1.0 + (-y).exp()) * up[at] } else { y };
            first.map(value).collect::<Vec<_>>()
        })
        .collect()
    }
}

fn launch(rig: &Rig, name: &str, kernel: (u32, u32, u32), arguments: &[Arg<'_>]) -> Result<(), CudaError> {
    let (tokens, threads, shared) = kernel;
    let kernel = format!("{name}_{tokens}");
    rig.driver.launch(&Launch { kernel: &kernel, grid: [3, 1, 1], block: [threads, 1, 1], shared, arguments })
}

/// Runs a kernel and gives its output, widened, by what it ran on.
fn multiply(
    kernel: (u32, u32, u32),
    case: &Case<'_>,
    operands: &Operands,
    gated: bool,
) -> Vec<(&'static str, Vec<f32>)> {
    let (total, shape) = (case.total(), (case.outputs, case.inner));
    on_each(|rig| {
        let x = rig.upload_bf16(&operands.x);
        let weights: Vec<_> = operands.weights.iter().map(|weights| rig.upload_bf16(weights)).collect();
        let map = |at| {
            if gated {
                maps::gated(rig, at, Element::Bf16, shape)
            } else {
                maps::rows(rig, at, Element::Bf16, shape, 64)
            }
        };
        let maps: Vec<_> = weights.iter().map(|weights| map(rig.at(weights))).collect();
        let addresses = rig.upload(&maps.iter().map(|map| rig.at(map)).collect::<Vec<u64>>());
        let x_map = maps::rows(rig, rig.at(&x), Element::Bf16, (total, case.inner), 16);
        let offsets = rig.upload(&case.offsets());
        let out =
            if gated { rig.poisoned::<u16>(total * case.outputs) } else { rig.poisoned::<f32>(total * case.outputs) };
        let sizes = [case.rows.len(), case.inner, case.outputs].map(|size| Arg::U32(size as u32));
        let [x, weights, begin, y] = [&x_map, &addresses, &offsets, &out].map(|memory| rig.at(memory));
        let addresses = [x, weights, begin, begin + 4, y].map(Arg::Address);
        let name = if gated { "sm90_grouped_gated" } else { "sm90_grouped_linear" };
        launch(rig, name, kernel, &[&addresses[..], &sizes].concat())?;
        let length = total * case.outputs;
        Ok(if gated { rig.download_bf16(&out, length) } else { rig.download(&out, length) })
    })
}

/// Groups without rows, with one, with a tile, with more; an inner dimension and outputs that fill no whole tile.
const CASES: [Case<'static>; 2] = [
    Case { rows: &[0, 3, 17, 0, 1, 66], inner: 136, outputs: 72 },
    Case { rows: &[130, 0, 1, 260], inner: 64, outputs: 136 },
];

/// Tensor cores may drop bits that a chain of fused multiply-adds keeps.
fn limit(on: &str) -> f64 {
    if on == "GPU" { 1e-4 } else { 1e-5 }
}

#[test]
fn products_are_near_their_definition() {
    for case in CASES {
        let operands = Operands::new(&case, false);
        let expected = operands.expected(&case, false);
        for kernel in KERNELS {
            for (on, found) in multiply(kernel, &case, &operands, false) {
                assert_close(&found, &expected, limit(on), &format!("{on} {kernel:?} {}", case.inner));
            }
        }
    }
}

#[test]
fn gated_products_are_near_their_definition() {
    for case in CASES {
        let operands = Operands::new(&case, true);
        let expected = operands.expected(&case, true);
        for kernel in KERNELS {
            for (on, found) in multiply(kernel, &case, &operands, true) {
                assert_close(&found, &expected, 1.0 / 256.0 + limit(on), &format!("{on} {kernel:?} {}", case.inner));
            }
        }
    }
}

#[test]
fn more_groups_than_a_warp_counts_at_once() {
    let rows: Vec<u32> = (0..75).map(|group| group % 4).collect();
    let case = Case { rows: &rows, inner: 64, outputs: 8 };
    let operands = Operands::new(&case, false);
    for (on, found) in multiply(KERNELS[0], &case, &operands, false) {
        assert_close(&found, &operands.expected(&case, false), limit(on), on);
    }
}

/// On a GPU this is a question, not a claim: only where the answer is yes may exact mode choose the tile by the rows.
#[test]
fn bits_do_not_depend_on_the_tokens_of_a_tile() {
    let operands = Operands::new(&CASES[0], false);
    let [first, rest @ ..] = KERNELS.map(|kernel| multiply(kernel, &CASES[0], &operands, false));
    for (kernel, other) in KERNELS[1..].iter().zip(&rest) {
        for ((on, first), (_, other)) in first.iter().zip(other) {
            let same = same_bits(first, other);
            assert!(same || *on == "GPU", "{} tokens a tile", kernel.0);
            if *on == "GPU" {
                eprintln!("GPU: {} and {} tokens a tile give the same bits: {same}", KERNELS[0].0, kernel.0);
            }
        }
    }
}
