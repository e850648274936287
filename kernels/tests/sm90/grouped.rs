//! Grouped products in bf16.

use conclave_kernels::{
    Dtype, activation,
    cuda::{
        Driver, Element,
        sm90::{
            GroupedHeads, GroupedProduct, Tokens,
            maps::{INPUT_ROWS, TILE_ROWS},
        },
    },
};

use crate::{
    driver::Memory,
    each::{on_each, same_bits},
    maps,
    support::{Numbers, Rig, assert_close},
};

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

/// Where gate and up lie: up behind gate in one allocation, or in two, of which either may be the first.
#[derive(Clone, Copy, PartialEq)]
enum Lies {
    Behind,
    Apart,
    Before,
}

/// The operands of a launch on the device.
struct Uploaded {
    _memory: Vec<Memory>,
    weights: Memory,
    x: Memory,
    offsets: Memory,
}

impl Operands {
    fn upload(&self, rig: &Rig, case: &Case<'_>, gated: bool, lies: Lies) -> Uploaded {
        let shape = (case.outputs, case.inner);
        let mut memory = vec![rig.upload_bf16(&self.x)];
        let x = maps::rows(rig, rig.at(&memory[0]), Element::Bf16, (case.total(), case.inner), INPUT_ROWS);
        let mut entries = Vec::new();
        for weights in &self.weights {
            let (map, exchanged) = match gated {
                false => {
                    memory.push(rig.upload_bf16(weights));
                    (maps::rows(rig, rig.at(memory.last().unwrap()), Element::Bf16, shape, TILE_ROWS), false)
                }
                true => maps::pair(rig, gate_and_up(rig, &mut memory, weights, lies), Element::Bf16, shape),
            };
            entries.push(rig.at(&map) + u64::from(exchanged));
            memory.push(map);
        }
        Uploaded { weights: rig.upload(&entries), x, offsets: rig.upload(&case.offsets()), _memory: memory }
    }
}

/// Where they are.
fn gate_and_up(rig: &Rig, memory: &mut Vec<Memory>, weights: &[f32], lies: Lies) -> [u64; 2] {
    let (gate, up) = weights.split_at(weights.len() / 2);
    if lies == Lies::Behind {
        memory.push(rig.upload_bf16(weights));
        let gate = rig.at(memory.last().unwrap());
        return [gate, gate + 2 * up.len() as u64];
    }
    let mut both = [rig.upload_bf16(gate), rig.upload_bf16(gate)];
    both.sort_by_key(|memory| rig.at(memory));
    let [first, second] = both;
    let (gate_memory, up_memory) = if lies == Lies::Before { (second, first) } else { (first, second) };
    rig.driver.upload(&up_memory, 0, &activation::encode(Dtype::Bf16, up)).unwrap();
    let at = [rig.at(&gate_memory), rig.at(&up_memory)];
    memory.extend([gate_memory, up_memory]);
    at
}

/// Runs a kernel and gives its output, widened, by what it ran on.
fn multiply(
    tokens: Tokens,
    case: &Case<'_>,
    operands: &Operands,
    gated: Option<Lies>,
) -> Vec<(&'static str, Vec<f32>)> {
    let length = case.total() * case.outputs;
    // A group by itself owns all rows: no offsets.
    let rows = if case.rows.len() == 1 { case.total() as u32 } else { 0 };
    let (groups, inner, outputs) = (case.rows.len() as u32, case.inner as u32, case.outputs as u32);
    on_each(|rig| {
        let uploaded = operands.upload(rig, case, gated.is_some(), gated.unwrap_or(Lies::Behind));
        let [x, weights, offsets] = [&uploaded.x, &uploaded.weights, &uploaded.offsets].map(|memory| rig.at(memory));
        let (begin, end) = if rows > 0 { (0, 0) } else { (offsets, offsets + 4) };
        let out = if gated.is_some() { rig.poisoned::<u16>(length) } else { rig.poisoned::<f32>(length) };
        let (y, blocks) = (rig.at(&out), 3);
        let product = gated.is_some();
        GroupedProduct { x, weights, begin, end, y, rows, groups, inner, outputs, gated: product, tokens, blocks }
            .launch(&rig.driver)?;
        Ok(if gated.is_some() { rig.download_bf16(&out, length) } else { rig.download(&out, length) })
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
        for tokens in Tokens::ALL {
            for (on, found) in multiply(tokens, &case, &operands, None) {
                assert_close(&found, &expected, limit(on), &format!("{on} {tokens:?} {}", case.inner));
            }
        }
    }
}

#[test]
fn gated_products_are_near_their_definition() {
    for (case, lies) in CASES.into_iter().zip([Lies::Behind, Lies::Before]) {
        let operands = Operands::new(&case, true);
        let expected = operands.expected(&case, true);
        for tokens in Tokens::ALL {
            for (on, found) in multiply(tokens, &case, &operands, Some(lies)) {
                assert_close(&found, &expected, 1.0 / 256.0 + limit(on), &format!("{on} {tokens:?} {}", case.inner));
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_where_up_lies() {
    let case = Case { rows: &[9], inner: 72, outputs: 72 };
    let operands = Operands::new(&case, true);
    let expected = operands.expected(&case, true);
    let [behind, apart, before] =
        [Lies::Behind, Lies::Apart, Lies::Before].map(|lies| multiply(Tokens::EXACT, &case, &operands, Some(lies)));
    for (((on, behind), (_, apart)), (_, before)) in behind.iter().zip(&apart).zip(&before) {
        assert_close(behind, &expected, 1.0 / 256.0 + limit(on), on);
        assert!(same_bits(behind, apart) && same_bits(behind, before), "{on}");
    }
}

/// A matrix a head, all of them of the same rows: inputs lie side by side, and so do outputs, with a gap.
#[test]
fn products_of_heads_are_near_their_definition() {
    for (rows, heads, inner, outputs, width) in [(19, 3, 72, 136, 144), (130, 2, 128, 8, 8)] {
        let all = vec![rows as u32; heads];
        let case = Case { rows: &all, inner, outputs };
        // As groups, one head after the other.
        let operands = Operands::new(&case, false);
        let expected = operands.expected(&case, false);
        let by_row = |row: usize, head: usize| &operands.x[(head * rows + row) * inner..][..inner];
        let x: Vec<f32> = (0..rows * heads).flat_map(|at| by_row(at / heads, at % heads)).copied().collect();
        let found = on_each(|rig| {
            let uploaded = operands.upload(rig, &case, false, Lies::Behind);
            let (x, out) = (rig.upload_bf16(&x), rig.poisoned::<u16>(rows * heads * width));
            let map = maps::heads(rig, rig.at(&x), (rows, heads, inner));
            GroupedHeads {
                x: rig.at(&map),
                weights: rig.at(&uploaded.weights),
                y: rig.at(&out),
                rows: rows as u32,
                heads: heads as u32,
                inner: inner as u32,
                outputs: outputs as u32,
                width: width as u32,
                blocks: 3,
            }
            .launch(&rig.driver)?;
            Ok(rig.download_bf16(&out, rows * heads * width))
        });
        for (on, found) in found {
            for (at, found) in found.chunks_exact(width).enumerate() {
                let (row, head) = (at / heads, at % heads);
                let expected = &expected[(head * rows + row) * outputs..][..outputs];
                assert_close(
                    &found[..outputs],
                    expected,
                    1.0 / 256.0 + limit(on),
                    &format!("{on} row {row} head {head}"),
                );
                assert!(found[outputs..].iter().all(|value| value.is_nan()), "{on}: written beside a head");
            }
        }
    }
}

#[test]
fn more_groups_than_a_warp_counts_at_once() {
    let rows: Vec<u32> = (0..75).map(|group| group % 4).collect();
    let case = Case { rows: &rows, inner: 64, outputs: 8 };
    let operands = Operands::new(&case, false);
    for (on, found) in multiply(Tokens::T16, &case, &operands, None) {
        assert_close(&found, &operands.expected(&case, false), limit(on), on);
    }
}

/// On a GPU this is a question, not a claim: only where the answer is yes may exact mode choose the tile by the rows.
#[test]
fn bits_do_not_depend_on_the_tokens_of_a_tile() {
    let operands = Operands::new(&CASES[0], false);
    let [first, rest @ ..] = Tokens::ALL.map(|tokens| multiply(tokens, &CASES[0], &operands, None));
    for (tokens, other) in Tokens::ALL[1..].iter().zip(&rest) {
        for ((on, first), (_, other)) in first.iter().zip(other) {
            let same = same_bits(first, other);
            assert!(same || *on == "GPU", "{} tokens a tile", tokens.count());
            if *on == "GPU" {
                eprintln!("GPU: {} and {} tokens a tile give the same bits: {same}", 16, tokens.count());
            }
        }
    }
}
