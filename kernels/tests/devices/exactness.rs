//! Same bits: no output depends on the rows beside it, on the number of threads, on how a sequence is cut into chunks,
//! or on what lies in unused slots of the cache.

use std::ops::Range;

use crate::support::{Case, Check, Model, Numbers, attend, batch, bits, buffer, on_each_device, output};
use conclave_kernels::{Device, ExpertRows, StepRows, activation};

const ROWS: usize = 17;
/// Row counts that a batch is cut into.
const CUTS: [&[usize]; 6] = [&[17], &[1; 17], &[2, 15], &[4, 5, 8], &[3, 1, 13], &[6, 7, 4]];

/// Runs `op(rows, out)` for each cut of the rows, and gives the outputs `[ROWS, width]`, the same for all of them.
fn for_all_cuts<D: Device>(
    device: &D,
    what: &str,
    width: usize,
    op: impl Fn(Range<usize>, &mut D::Buffer),
) -> Vec<u32> {
    let mut outputs = CUTS.map(|cut| {
        let mut all = Vec::new();
        let mut row = 0;
        for rows in cut {
            all.extend(output(device, rows * width, |out| op(row..row + rows, out)));
            row += rows;
        }
        assert!(all.iter().all(|value| value.is_finite()), "{what} of width {width}: some output not written");
        bits(&all)
    });
    for (found, cut) in outputs.iter().zip(CUTS) {
        assert!(*found == outputs[0], "{what} of width {width}, rows cut {cut:?}");
    }
    std::mem::take(&mut outputs[0])
}

/// Some rows of a step, each a sequence of its own.
fn step<D: Device>(device: &D, case: &Case, rows: Range<usize>) -> D::Batch {
    let mut step = StepRows::default();
    rows.for_each(|row| step.push(&[(row * 17 % case.vocab) as u32], row * 31 % 100, &[0, 1], D::BLOCK));
    batch(device, step)
}

/// All operations on rows, each with every cut.
fn rows_in_batches<D: Device>(device: &D, case: &Case) -> Vec<Vec<u32>> {
    let (model, mut numbers) = (case.load(device), Numbers::new(1));
    let (hidden, shape) = (case.hidden, case.shape);
    let x = numbers.vector(ROWS * hidden, 2.0);
    let q_width = shape.heads * (shape.nope + shape.rope);
    let q = numbers.vector(ROWS * q_width, 1.0);
    let o_width = shape.heads * shape.latent;
    let o_lat = numbers.vector(ROWS * o_width, 1.0);
    let some = |of: &[f32], rows: Range<usize>, width: usize| buffer(device, &of[rows.start * width..rows.end * width]);
    let x = |rows| some(&x, rows, hidden);
    vec![
        for_all_cuts(device, "linear", case.vocab, |rows, out| device.linear(&x(rows), &model.lm_head, out)),
        for_all_cuts(device, "gate_logits", case.vocab, |rows, out| device.gate_logits(&x(rows), &model.gate, out)),
        for_all_cuts(device, "ffn", hidden, |rows, out| device.ffn(&x(rows), &model.experts[0], out)),
        for_all_cuts(device, "rms_norm", hidden, |rows, out| device.rms_norm(&x(rows), &model.gain, 1e-6, out)),
        for_all_cuts(device, "ffn 1", hidden, |rows, out| device.ffn(&x(rows), &model.experts[1], out)),
        for_all_cuts(device, "ffn 2", hidden, |rows, out| device.ffn(&x(rows), &model.experts[2], out)),
        for_all_cuts(device, "embed", hidden, |rows, out| device.embed(&model.table, &step(device, case, rows), out)),
        for_all_cuts(device, "mla_queries", shape.heads * shape.cached(), |rows, out| {
            let q = some(&q, rows.clone(), q_width);
            device.mla_queries(&model.mla, &step(device, case, rows), &q, &model.uk, out);
        }),
        for_all_cuts(device, "mla_values", shape.heads * shape.value, |rows, out| {
            let o_lat = some(&o_lat, rows.clone(), o_width);
            device.mla_values(&model.mla, &step(device, case, rows), &o_lat, &model.uv, out);
        }),
    ]
}

/// Two of three rows go to an expert.
fn goes_to(expert: usize, row: usize) -> bool {
    !(row + expert).is_multiple_of(3)
}

fn weight(expert: usize, row: usize) -> f32 {
    0.1 + 0.2 * expert as f32 + 0.01 * row as f32
}

/// Weighted sums of experts for some rows of `x`, which come in parts; zero elsewhere.
fn experts<D: Device>(device: &D, model: &Model<D>, x: &[&[u8]], rows: Range<u32>, hidden: usize) -> Vec<f32> {
    let chosen: Vec<(Vec<u32>, Vec<f32>)> = (0..model.experts.len())
        .map(|expert| {
            let rows: Vec<u32> = rows.clone().filter(|row| goes_to(expert, *row as usize)).collect();
            let weights = rows.iter().map(|row| weight(expert, *row as usize)).collect();
            (rows, weights)
        })
        .collect();
    let experts: Vec<ExpertRows<'_, D::Matrix>> = (model.experts.iter().zip(&chosen))
        .map(|(ffn, (rows, weights))| ExpertRows { ffn, rows, weights, slots: rows })
        .collect();
    let mut sums = vec![f32::NAN; ROWS * hidden];
    device.grouped_ffn(x, &experts, &mut sums).unwrap();
    sums
}

fn experts_in_batches<D: Device>(device: &D, case: &Case) -> Vec<u32> {
    let (model, hidden) = (case.load(device), case.hidden);
    let mut x = Numbers::new(2).vector(ROWS * hidden, 1.0);
    activation::round(device.activation(), &mut x);
    let bytes = activation::encode(device.activation(), &x);
    let whole = experts(device, &model, &[&bytes], 0..ROWS as u32, hidden);
    let (first, second) = bytes.split_at(bytes.len() / ROWS * 5);
    let parts = experts(device, &model, &[first, &[], second], 0..ROWS as u32, hidden);
    assert!(bits(&whole) == bits(&parts), "grouped_ffn: rows in one part and in three");
    for row in 0..ROWS {
        let alone = experts(device, &model, &[&bytes], row as u32..row as u32 + 1, hidden);
        let of_row = row * hidden..(row + 1) * hidden;
        assert!(bits(&whole[of_row.clone()]) == bits(&alone[of_row]), "grouped_ffn: row {row} beside others and alone");
    }

    let mut sums = vec![0.0; ROWS * hidden];
    for (expert, ffn) in model.experts.iter().enumerate() {
        for row in (0..ROWS).filter(|row| goes_to(expert, *row)) {
            let of_row = row * hidden..(row + 1) * hidden;
            let y = output(device, hidden, |y| device.ffn(&buffer(device, &x[of_row.clone()]), ffn, y));
            sums[of_row].iter_mut().zip(&y).for_each(|(sum, y)| *sum += weight(expert, row) * y);
        }
    }
    activation::round(device.activation(), &mut sums);
    assert!(bits(&whole) == bits(&sums), "grouped_ffn and the sum over experts of ffn");
    bits(&whole)
}

pub(crate) struct Batches(pub(crate) Case);

impl Check for Batches {
    fn on<D: Device>(&mut self, device: &D) {
        rows_in_batches(device, &self.0);
        experts_in_batches(device, &self.0);
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    on_each_device(2, &mut Batches(Case::odd()));
    on_each_device(2, &mut Batches(Case::even()));
    Case::all_fp8().into_iter().for_each(|case| on_each_device(2, &mut Batches(case)));
}

/// Up to so many rows.
pub(crate) struct BatchSizes(pub(crate) Case, pub(crate) usize);

impl Check for BatchSizes {
    fn on<D: Device>(&mut self, device: &D) {
        let Self(case, most) = self;
        let (model, hidden) = (case.load(device), case.hidden);
        let x = Numbers::new(9).vector(*most * hidden, 2.0);
        let check = |what: &str, width: usize, op: &dyn Fn(&D::Buffer, &mut D::Buffer)| {
            let run =
                |rows: usize| bits(&output(device, rows * width, |out| op(&buffer(device, &x[..rows * hidden]), out)));
            let all = run(*most);
            for rows in 1..*most {
                assert!(run(rows) == all[..rows * width], "{what} of {rows} rows, {}", device.numerics());
            }
        };
        check("linear", case.vocab, &|x, out| device.linear(x, &model.lm_head, out));
        check("gate_logits", case.vocab, &|x, out| device.gate_logits(x, &model.gate, out));
        check("ffn", hidden, &|x, out| device.ffn(x, &model.experts[0], out));
        if case.fp8.is_some() {
            // In part in bf16.
            check("ffn 2", hidden, &|x, out| device.ffn(x, &model.experts[2], out));
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_size_of_the_batch() {
    on_each_device(2, &mut BatchSizes(Case::odd(), 64));
    on_each_device(2, &mut BatchSizes(Case::even().in_fp8((128, 128)), 64));
}

/// Lengths of sequences, and how they are cut.
pub(crate) struct Chunks(pub(crate) Case, pub(crate) &'static [usize], pub(crate) &'static [&'static [usize]]);

const CHUNKS: &[&[usize]] = &[&[1], &[16], &[64], &[512], &[300, 1, 7]];

impl Check for Chunks {
    fn on<D: Device>(&mut self, device: &D) {
        let Self(case, lengths, cuts) = self;
        for &length in *lengths {
            let whole = attend(device, case, length, &[length], false);
            for cut in *cuts {
                let found = attend(device, case, length, cut, false);
                assert!(whole == found, "attention over {length} positions cut {cut:?}, {}", device.numerics());
            }
        }
    }
}

#[test]
fn a_position_does_not_depend_on_how_its_sequence_is_cut() {
    on_each_device(2, &mut Chunks(Case::odd(), &[1, 7, 65, 513, 1100], CHUNKS));
    on_each_device(2, &mut Chunks(Case::even(), &[64, 600], CHUNKS));
    on_each_device(2, &mut Chunks(Case::in_place(), &[33, 600], CHUNKS));
}

/// Lengths of sequences, and of their chunks.
pub(crate) struct Poison(pub(crate) Case, pub(crate) &'static [(usize, usize)]);

const POISONED: &[(usize, usize)] = &[(1, 1), (70, 70), (70, 1), (530, 100)];

impl Check for Poison {
    fn on<D: Device>(&mut self, device: &D) {
        for &(length, cut) in self.1 {
            let clean = attend(device, &self.0, length, &[length], false);
            let poisoned = attend(device, &self.0, length, &[cut], true);
            assert!(clean == poisoned, "attention over {length} positions beside NaN, {}", device.numerics());
        }
    }
}

#[test]
fn unused_slots_are_not_read() {
    on_each_device(2, &mut Poison(Case::odd(), POISONED));
    on_each_device(2, &mut Poison(Case::even(), POISONED));
    on_each_device(2, &mut Poison(Case::in_place(), POISONED));
}

/// Everything that is computed, on one number of threads, for one device after the other.
struct Everything(Vec<Vec<u32>>);

impl Check for Everything {
    fn on<D: Device>(&mut self, device: &D) {
        for case in [Case::odd(), Case::even()] {
            self.0.extend(rows_in_batches(device, &case));
            self.0.push(experts_in_batches(device, &case));
            self.0.push(attend(device, &case, 600, &[100], false));
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let [one, two, three] = [1, 2, 3].map(|threads| {
        let mut everything = Everything(Vec::new());
        on_each_device(threads, &mut everything);
        everything.0
    });
    assert!(one == two, "1 and 2 threads");
    assert!(one == three, "1 and 3 threads");
}
