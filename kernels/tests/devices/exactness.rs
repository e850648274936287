//! Same bits: no output depends on the rows beside it, on the number of threads, on how a sequence is cut into chunks,
//! or on what lies in unused slots of the cache.

use std::ops::Range;

use crate::support::{Case, Check, Model, Numbers, attend, bits, on_each_device};
use conclave_kernels::{Device, ExpertRows};

const ROWS: usize = 17;
/// Row counts that a batch is cut into.
const CUTS: [&[usize]; 6] = [&[17], &[1; 17], &[2, 15], &[4, 5, 8], &[3, 1, 13], &[6, 7, 4]];

/// Runs `op(rows, out)` for each cut of the rows, and gives the outputs `[ROWS, width]`, the same for all of them.
fn for_all_cuts(what: &str, width: usize, op: impl Fn(Range<usize>, &mut [f32])) -> Vec<u32> {
    let mut outputs = CUTS.map(|cut| {
        let mut out = vec![f32::NAN; ROWS * width];
        let mut row = 0;
        for rows in cut {
            op(row..row + rows, &mut out[row * width..(row + rows) * width]);
            row += rows;
        }
        assert!(out.iter().all(|value| value.is_finite()), "{what} of width {width}: some output not written");
        bits(&out)
    });
    for (found, cut) in outputs.iter().zip(CUTS) {
        assert!(*found == outputs[0], "{what} of width {width}, rows cut {cut:?}");
    }
    std::mem::take(&mut outputs[0])
}

/// All operations on rows, each with every cut.
fn rows_in_batches<D: Device>(device: &D, case: &Case) -> Vec<Vec<u32>> {
    let (model, mut numbers) = (case.load(device), Numbers::new(1));
    let (hidden, shape) = (case.hidden, case.shape);
    let of = |rows: &Range<usize>, width: usize| rows.start * width..rows.end * width;
    let x = numbers.vector(ROWS * hidden, 2.0);
    let q_width = shape.heads * (shape.nope + shape.rope);
    let q = numbers.vector(ROWS * q_width, 1.0);
    let o_width = shape.heads * shape.latent;
    let o_lat = numbers.vector(ROWS * o_width, 1.0);
    let tokens: Vec<u32> = (0..ROWS).map(|row| (row * 17 % case.vocab) as u32).collect();
    let positions: Vec<u32> = (0..ROWS as u32).map(|row| row * 31 % 100).collect();
    vec![
        for_all_cuts("linear", case.vocab, |rows, out| device.linear(&x[of(&rows, hidden)], &model.lm_head, out)),
        for_all_cuts("gate_logits", case.vocab, |rows, out| {
            device.gate_logits(&x[of(&rows, hidden)], &model.lm_head, out);
        }),
        for_all_cuts("ffn", hidden, |rows, out| device.ffn(&x[of(&rows, hidden)], &model.experts[0], out)),
        for_all_cuts("rms_norm", hidden, |rows, out| {
            device.rms_norm(&x[of(&rows, hidden)], &model.gain, 1e-6, out);
        }),
        for_all_cuts("embed", hidden, |rows, out| device.embed(&model.table, &tokens[rows], out)),
        for_all_cuts("mla_queries", shape.heads * shape.cached(), |rows, out| {
            let q = &q[of(&rows, q_width)];
            device.mla_queries(&shape, q, &model.uk, &model.rotary, &positions[rows], out);
        }),
        for_all_cuts("mla_values", shape.heads * shape.value, |rows, out| {
            device.mla_values(&shape, &o_lat[of(&rows, o_width)], &model.uv, out);
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

/// Weighted sums of experts for some rows of `x`.
fn experts<D: Device>(device: &D, model: &Model<D>, x: &[f32], rows: Range<u32>, out: &mut [f32]) {
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
    device.grouped_ffn(x, &experts, out);
}

fn experts_in_batches<D: Device>(device: &D, case: &Case) -> Vec<u32> {
    let (model, hidden) = (case.load(device), case.hidden);
    let x = Numbers::new(2).vector(ROWS * hidden, 1.0);
    let mut whole = vec![0.0; ROWS * hidden];
    experts(device, &model, &x, 0..ROWS as u32, &mut whole);
    let mut alone = vec![0.0; ROWS * hidden];
    (0..ROWS as u32).for_each(|row| experts(device, &model, &x, row..row + 1, &mut alone));
    assert!(bits(&whole) == bits(&alone), "grouped_ffn: rows together and alone");

    let mut sums = vec![0.0; ROWS * hidden];
    let mut y = vec![0.0; hidden];
    for (expert, ffn) in model.experts.iter().enumerate() {
        for row in (0..ROWS).filter(|row| goes_to(expert, *row)) {
            let of_row = row * hidden..(row + 1) * hidden;
            device.ffn(&x[of_row.clone()], ffn, &mut y);
            sums[of_row].iter_mut().zip(&y).for_each(|(sum, y)| *sum += weight(expert, row) * y);
        }
    }
    assert!(bits(&whole) == bits(&sums), "grouped_ffn and the sum over experts of ffn");
    bits(&whole)
}

struct Batches(Case);

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
}

struct BatchSizes(Case);

impl Check for BatchSizes {
    fn on<D: Device>(&mut self, device: &D) {
        const MOST: usize = 64;
        let Self(case) = self;
        let (model, hidden) = (case.load(device), case.hidden);
        let x = Numbers::new(9).vector(MOST * hidden, 2.0);
        let check = |what: &str, width: usize, op: &dyn Fn(&[f32], &mut [f32])| {
            let run = |rows: usize| {
                let mut out = vec![f32::NAN; rows * width];
                op(&x[..rows * hidden], &mut out);
                bits(&out)
            };
            let all = run(MOST);
            for rows in 1..MOST {
                assert!(run(rows) == all[..rows * width], "{what} of {rows} rows, {}", device.numerics());
            }
        };
        check("linear", case.vocab, &|x, out| device.linear(x, &model.lm_head, out));
        check("gate_logits", case.vocab, &|x, out| device.gate_logits(x, &model.lm_head, out));
        check("ffn", hidden, &|x, out| device.ffn(x, &model.experts[0], out));
    }
}

#[test]
fn a_row_does_not_depend_on_the_size_of_the_batch() {
    on_each_device(2, &mut BatchSizes(Case::odd()));
}

struct Chunks(Case, &'static [usize]);

impl Check for Chunks {
    fn on<D: Device>(&mut self, device: &D) {
        let Self(case, lengths) = self;
        for &length in *lengths {
            let whole = attend(device, case, length, &[length], false);
            for cut in [&[1][..], &[16], &[64], &[512], &[300, 1, 7]] {
                let found = attend(device, case, length, cut, false);
                assert!(whole == found, "attention over {length} positions cut {cut:?}, {}", device.numerics());
            }
        }
    }
}

#[test]
fn a_position_does_not_depend_on_how_its_sequence_is_cut() {
    on_each_device(2, &mut Chunks(Case::odd(), &[1, 7, 65, 513, 1100]));
    on_each_device(2, &mut Chunks(Case::even(), &[64, 600]));
}

struct Poison(Case);

impl Check for Poison {
    fn on<D: Device>(&mut self, device: &D) {
        for (length, cut) in [(1, 1), (70, 70), (70, 1), (530, 100)] {
            let clean = attend(device, &self.0, length, &[length], false);
            let poisoned = attend(device, &self.0, length, &[cut], true);
            assert!(clean == poisoned, "attention over {length} positions beside NaN, {}", device.numerics());
        }
    }
}

#[test]
fn unused_slots_are_not_read() {
    on_each_device(2, &mut Poison(Case::odd()));
    on_each_device(2, &mut Poison(Case::even()));
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
