//! Devices agree: the CPU with the reference within the rounding of bf16, its instruction sets with each other closely.

use std::fmt::Display;

use proptest::prelude::*;

use crate::support::{Case, Check, Numbers, attend, batch, buffer, encode, instruction_sets, on_each_device, output};
use conclave_kernels::{Cpu, Device, Dtype, ExpertRows, Ffn, Isa, Pool, Reference, StepRows, Weight, activation};

const ROWS: usize = 8;
/// Of sequences: within one split, and in two.
const LENGTHS: &[usize] = &[5, 700];

/// Rows of a step with these tokens and positions, each a sequence of its own.
fn step<D: Device>(device: &D, tokens: &[u32], positions: &[usize]) -> D::Batch {
    let blocks = vec![0; 64];
    let mut rows = StepRows::default();
    tokens.iter().zip(positions).for_each(|(token, position)| rows.push(&[*token], *position, &blocks, D::BLOCK));
    batch(device, rows)
}

/// Every operation once, by name; attention over sequences of these lengths.
pub(crate) fn run<D: Device>(device: &D, case: &Case, lengths: &[usize]) -> Vec<(String, Vec<f32>)> {
    let (model, mut numbers) = (case.load(device), Numbers::new(3));
    let (hidden, shape) = (case.hidden, case.shape);
    let values = numbers.vector(ROWS * hidden, 1.0);
    let x = buffer(device, &values);
    let batch = step(device, &[0, 1, 5, 160, 3, 3, 9, 42], &[0, 1, 2, 3, 500, 600, 1000, 1199]);
    let mut results = Vec::new();
    let mut of = |name: &str, width: usize, op: &dyn Fn(&mut D::Buffer)| {
        results.push((name.to_owned(), output(device, ROWS * width, op)));
    };
    of("embed", hidden, &|out| device.embed(&model.table, &batch, out));
    of("rms_norm", hidden, &|out| device.rms_norm(&x, &model.gain, 1e-3, out));
    of("linear", case.vocab, &|out| device.linear(&x, &model.lm_head, out));
    of("gate_logits", case.vocab, &|out| device.gate_logits(&x, &model.gate, out));
    of("ffn", hidden, &|out| device.ffn(&x, &model.experts[1], out));
    of("decode", hidden, &|out| device.decode(&encode(device, &x).unwrap(), out));
    let q = buffer(device, &numbers.vector(ROWS * shape.heads * (shape.nope + shape.rope), 1.0));
    of("mla_queries", shape.heads * shape.cached(), &|out| {
        device.mla_queries(&model.mla, &batch, &q, &model.uk, out);
    });
    let o_lat = buffer(device, &numbers.vector(ROWS * shape.heads * shape.latent, 1.0));
    of("mla_values", shape.heads * shape.value, &|out| device.mla_values(&model.mla, &batch, &o_lat, &model.uv, out));
    results.push(("grouped_ffn".to_owned(), grouped(device, &[&model.experts[2], &model.experts[0]], &values)));
    for length in lengths {
        let out = attend(device, case, *length, &[*length], false);
        results.push((format!("attention {length}"), out.into_iter().map(f32::from_bits).collect()));
    }
    results
}

/// Some rows of `x` through each expert.
fn grouped<D: Device>(device: &D, experts: &[&Ffn<D::Matrix>], x: &[f32]) -> Vec<f32> {
    let (rows, weights, slots) = ([0, 3, 7], [0.5, 2.0, 1.0], [1, 0, 2]);
    let experts: Vec<ExpertRows<'_, _>> =
        experts.iter().map(|ffn| ExpertRows { ffn, rows: &rows, weights: &weights, slots: &slots }).collect();
    let x = activation::encode(device.activation(), x);
    let mut sums = vec![f32::NAN; x.len() / device.activation().size() / ROWS * 4];
    device.grouped_ffn(&[&x], &experts, &mut sums).unwrap();
    sums
}

/// Root mean square of the difference, as a part of that of `expected`.
pub(crate) fn error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = found.iter().zip(expected).map(|(found, expected)| square(found - expected)).sum();
    (difference / expected.iter().map(|expected| square(*expected)).sum::<f64>()).sqrt()
}

/// Root mean square of the difference, as a part of that of `expected`, of what has this name.
pub(crate) fn error_of(name: &str, found: &[(String, Vec<f32>)], expected: &[(String, Vec<f32>)]) -> f64 {
    let of = |results: &[(String, Vec<f32>)]| results.iter().find(|(known, _)| known == name).unwrap().1.clone();
    error(&of(found), &of(expected))
}

pub(crate) fn compare<N: Display>(found: &[(N, Vec<f32>)], expected: &[(N, Vec<f32>)], limit: f64) {
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        assert_eq!(found.len(), expected.len(), "{name}");
        let error = error(found, expected);
        assert!(error < limit, "{name}: relative error {error:.2e}, limit {limit:.0e}");
    }
}

/// What only moves and adds values does so exactly.
pub(crate) struct Moves;

impl Check for Moves {
    fn on<D: Device>(&mut self, device: &D) {
        let mut numbers = Numbers::new(12);
        let (a, b, c) = (numbers.vector(30, 1.0), numbers.vector(30, 1.0), numbers.vector(30, 1.0));
        let (second, third) = (buffer(device, &b), buffer(device, &c));
        let run = |op: &dyn Fn(&mut D::Buffer)| {
            output(device, 30, |out| {
                *out = buffer(device, &a);
                op(out);
            })
        };
        let sums = |of: &dyn Fn(usize) -> f32| (0..30).map(of).collect::<Vec<f32>>();
        assert_eq!(run(&|out| device.add(out, &second)), sums(&|i| a[i] + b[i]));
        assert_eq!(run(&|out| device.add_two(out, &second, &third)), sums(&|i| a[i] + (b[i] + c[i])));
        let rows = output(device, 15, |out| {
            device.gather(&[(&buffer(device, &a), &[4, 0]), (&second, &[3])], 5, out);
        });
        assert_eq!(rows, [&a[20..25], &a[..5], &b[15..20]].concat());
        let mut rounded = a.clone();
        activation::round(device.activation(), &mut rounded);
        let (x, mut y) = (buffer(device, &a), buffer(device, &b[..7]));
        let fetched = device.fetch(&x, &mut y);
        let (bytes, values) = device.take(fetched).unwrap();
        assert_eq!(bytes, activation::encode(device.activation(), &a));
        assert_eq!(values, b[..7]);
        assert_eq!(output(device, 30, |out| device.decode(&bytes, out)), rounded);
        assert_eq!(device.length(&buffer(device, &a)), 30);
    }
}

#[test]
fn values_are_moved_and_added_exactly() {
    on_each_device(1, &mut Moves);
}

#[test]
fn cpu_is_near_the_reference() {
    let reference = Reference::new(Pool::new(2).unwrap());
    for case in [Case::odd(), Case::even()].into_iter().chain(Case::all_fp8()) {
        let expected = run(&reference, &case, LENGTHS);
        for isa in instruction_sets() {
            let cpu = Cpu::new(Pool::new(2).unwrap(), Some(isa)).unwrap();
            assert_eq!((cpu.activation(), cpu.numerics()), (Dtype::Bf16, format!("cpu-{isa}-3")));
            compare(&run(&cpu, &case, LENGTHS), &expected, 8e-3);
        }
    }
}

#[test]
fn instruction_sets_are_near_each_other() {
    for case in [Case::odd(), Case::even()].into_iter().chain(Case::all_fp8()) {
        let run = |isa| run(&Cpu::new(Pool::new(1).unwrap(), Some(isa)).unwrap(), &case, LENGTHS);
        let portable = run(Isa::Portable);
        for isa in instruction_sets().iter().filter(|isa| **isa != Isa::Portable) {
            // A sum that is rounded otherwise may fall on the other side of a bf16 step, seldom.
            compare(&run(*isa), &portable, 1e-3);
        }
    }
}

#[test]
fn gate_logits_see_the_input_unrounded() {
    let case = Case::even();
    for isa in instruction_sets() {
        let cpu = Cpu::new(Pool::new(1).unwrap(), Some(isa)).unwrap();
        let model = case.load(&cpu);
        let x = Numbers::new(4).vector(case.hidden, 1.0);
        let mut rounded = x.clone();
        activation::round(Dtype::Bf16, &mut rounded);
        let logits = |x: &Vec<f32>| output(&cpu, case.vocab, |y| cpu.gate_logits(x, &model.lm_head, y));
        let linear = |x: &Vec<f32>| output(&cpu, case.vocab, |y| cpu.linear(x, &model.lm_head, y));
        assert_ne!(logits(&x), logits(&rounded), "{isa}");
        assert_eq!(linear(&x), linear(&rounded), "{isa}");
        assert!(error(&linear(&x), &logits(&rounded)) < 1e-5, "{isa}");
    }
}

#[test]
fn reference_linear_is_the_plain_sum() {
    let reference = Reference::new(Pool::new(2).unwrap());
    let (outputs, inputs) = (37, 29);
    let mut numbers = Numbers::new(8);
    let w = numbers.vector(outputs * inputs, 1.0);
    let x = numbers.vector(5 * inputs, 1.0);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let bytes = activation::encode(dtype, &w);
        let weight = Weight::new(dtype, &bytes, outputs, inputs).unwrap();
        let matrix = reference.load_matrix(weight).unwrap();
        let mut stored = w.clone();
        activation::round(dtype, &mut stored);
        let y = output(&reference, 5 * outputs, |y| reference.linear(&x, &matrix, y));
        for (row, y) in y.chunks_exact(outputs).enumerate() {
            for (output, y) in y.iter().enumerate() {
                let mut sum = 0.0;
                for k in 0..inputs {
                    sum += x[row * inputs + k] * stored[output * inputs + k];
                }
                assert_eq!(*y, sum, "row {row}, output {output}, {dtype}");
            }
        }
    }
}

/// One output by definition: of inputs rounded to bf16, or of f32 ones as they are.
fn defined(isa: Isa, inputs: Dtype, x: &[f32], w: &[f32]) -> f32 {
    match (isa, inputs) {
        (Isa::Amx, Dtype::Bf16) => tiles(x, w),
        (Isa::Avx512, Dtype::Bf16) => pairs(x, w),
        (Isa::Portable, _) => x.iter().zip(w).fold(0.0, |sum, (x, w)| sum + x * w),
        _ => fused(0.0, x.iter().zip(w)),
    }
}

/// A chain of fused multiply-adds.
fn fused<'a>(start: f32, steps: impl Iterator<Item = (&'a f32, &'a f32)>) -> f32 {
    steps.fold(start, |sum, (x, w)| x.mul_add(*w, sum))
}

/// A chain, of each two steps the second one first.
fn pairs(x: &[f32], w: &[f32]) -> f32 {
    x.chunks(2).zip(w.chunks(2)).fold(0.0, |sum, (x, w)| fused(sum, x.iter().zip(w).rev()))
}

/// Of each 32 steps, the sum of the even and that of the odd ones, added to what comes before.
fn tiles(x: &[f32], w: &[f32]) -> f32 {
    let half = |x: &[f32], w: &[f32], first| fused(0.0, x.iter().zip(w).skip(first).step_by(2));
    x.chunks(32).zip(w.chunks(32)).fold(0.0, |sum, (x, w)| sum + (half(x, w, 0) + half(x, w, 1)))
}

/// Compares the products of each instruction set with their definition, bit by bit.
fn check_products((rows, outputs, inputs): (usize, usize, usize), threads: usize, seed: u64) {
    let mut numbers = Numbers::new(seed);
    let (x, mut w) = (numbers.vector(rows * inputs, 1.0), numbers.vector(outputs * inputs, 1.0));
    let bytes = activation::encode(Dtype::F32, &w);
    activation::round(Dtype::Bf16, &mut w);
    for isa in instruction_sets() {
        let cpu = Cpu::new(Pool::new(threads).unwrap(), Some(isa)).unwrap();
        let matrix = cpu.load_matrix(Weight::new(Dtype::F32, &bytes, outputs, inputs).unwrap()).unwrap();
        for dtype in [Dtype::Bf16, Dtype::F32] {
            let y = output(&cpu, rows * outputs, |y| match dtype {
                Dtype::Bf16 => cpu.linear(&x, &matrix, y),
                Dtype::F32 => cpu.gate_logits(&x, &matrix, y),
            });
            let mut x = x.clone();
            activation::round(dtype, &mut x);
            for (row, (x, y)) in x.chunks_exact(inputs).zip(y.chunks_exact(outputs)).enumerate() {
                let expected: Vec<f32> = w.chunks_exact(inputs).map(|w| defined(isa, dtype, x, w)).collect();
                assert_eq!(y, expected, "{isa}, {dtype}, row {row} of {rows} x {outputs} x {inputs}");
            }
        }
    }
}

proptest! {
    #[test]
    fn products_are_summed_as_defined(
        sizes in (1usize..40, 1usize..90, 1usize..70),
        threads in 1usize..4,
        seed: u64,
    ) {
        check_products(sizes, threads, seed);
    }
}

#[test]
fn long_sums_are_not_rounded_between_strips() {
    for rows in [1, 8, 16, 33] {
        check_products((rows, 70, 2200), 1, rows as u64);
    }
}
