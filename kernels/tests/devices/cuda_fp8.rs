//! Weights in FP8 on the CUDA device: products in FP8 by the plain kernels and by those for sm_90a, and mixtures with bf16.

use conclave_kernels::{
    Device, Dtype, Fp8Weights, Pool, Reference, activation,
    cuda::{Cuda, Shim},
};

use crate::{
    agreement::{self, compare, error, error_of},
    cuda::{kernels_of, on_cuda, on_sm90},
    exactness::{BatchSizes, Batches},
    expanded::Long,
    fp8,
    support::{Case, Check, Model, Numbers, Stored, bits, buffer, output},
};

/// Blocks as models have them, and some that no size is a multiple of.
const BLOCK: (usize, usize) = (128, 128);
const ODD: (usize, usize) = (32, 16);

/// Relative distance of one product from that with rows that are not rounded, and of three in a row. Three bits of a mantissa
/// are off by 2.6 % in the mean square; a block goes through that twice for its input (gate and up) and once between.
const PRODUCT: f64 = 3e-2;
const BLOCK_OF_THREE: f64 = 6e-2;

fn odd() -> Case {
    Case::odd().in_fp8(ODD)
}

/// Sizes that the kernels for sm_90a take in FP8, of more than one block, some of which fill no whole tile.
fn tiled() -> Case {
    Case { hidden: 144, inner: 208, ..Case::tiled() }.in_fp8(BLOCK)
}

fn reference() -> Reference {
    Reference::new(Pool::new(2).unwrap())
}

/// The same weights on the reference device, which widens them.
struct Near(Case);

impl Check for Near {
    fn on<D: Device>(&mut self, device: &D) {
        assert_eq!(device.fp8_weights(), Fp8Weights::Multiplied);
        let [found, expected] = [agreement::run(device, &self.0, &[5]), agreement::run(&reference(), &self.0, &[5])];
        for (name, limit) in [("linear", PRODUCT), ("ffn", BLOCK_OF_THREE), ("grouped_ffn", BLOCK_OF_THREE)] {
            let distance = error_of(name, &found, &expected);
            println!("{}: {name} in FP8: {distance:.2e}", device.numerics());
            assert!(distance < limit, "{name}: relative error {distance:.2e}, limit {limit:.0e}");
            assert!(distance > 1e-2, "{name}: {distance:.2e}: its rows were not rounded to FP8");
        }
        let wide = |results: Vec<(String, Vec<f32>)>| {
            let other = |(name, _): &(String, _)| !["linear", "ffn", "grouped_ffn"].contains(&name.as_str());
            results.into_iter().filter(other).collect::<Vec<_>>()
        };
        compare(&wide(found), &wide(expected), 8e-3);
    }
}

#[test]
fn products_in_fp8_are_near_the_reference() {
    on_cuda(&mut Near(odd()));
    on_sm90(&mut Near(tiled()));
    // None of the kernels for sm_90a takes these blocks.
    on_sm90(&mut Near(Case { fp8: Some(ODD), ..tiled() }));
}

/// A product is that of the reference on rows rounded as they are to be; a block too, rounded again between its products.
struct Defined(Case);

impl Check for Defined {
    fn on<D: Device>(&mut self, device: &D) {
        let (case, rows, width) = (&self.0, 5, self.0.fp8.unwrap().1);
        let reference = reference();
        let (model, defined): (Model<D>, Model<Reference>) = (case.load(device), case.load(&reference));
        let x = Numbers::new(8).vector(rows * case.hidden, 1.0);
        let rounded = fp8::rows(&x, case.hidden, width);
        let product =
            |x: &Vec<f32>, w, outputs: usize| output(&reference, rows * outputs, |y| reference.linear(x, w, y));
        let found = output(device, rows * case.vocab, |y| device.linear(&buffer(device, &x), &model.lm_head, y));
        let distance = error(&found, &product(&rounded, &defined.lm_head, case.vocab));
        // Sums of e4m3 products on tensor cores keep some 14 bits.
        assert!(distance < 1e-3, "linear: {distance:.2e}");

        let ffn = &defined.experts[0];
        let [gate, up] = [&ffn.gate, &ffn.up].map(|w| product(&rounded, w, case.inner));
        let between = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<f32>>();
        let expected = product(&fp8::rows(&between, case.inner, width), &ffn.down, case.hidden);
        let found = output(device, rows * case.hidden, |y| device.ffn(&buffer(device, &x), &model.experts[0], y));
        let distance = error(&found, &expected);
        // Seldom, a value between two steps goes the other way.
        assert!(distance < 5e-3, "ffn: {distance:.2e}");
    }
}

#[test]
fn rows_are_rounded_before_each_product() {
    on_cuda(&mut Defined(odd()));
    on_sm90(&mut Defined(tiled()));
}

#[test]
fn in_fp8_a_row_does_not_depend_on_the_rows_beside_it() {
    on_cuda(&mut Batches(odd()));
    on_cuda(&mut BatchSizes(odd(), 18));
    on_sm90(&mut Batches(tiled()));
    on_sm90(&mut BatchSizes(tiled(), 18));
}

/// A device that may choose among products.
struct Relaxed(Near);

impl Check for Relaxed {
    fn on<D: Device>(&mut self, device: &D) {
        device.relax();
        self.0.on(device);
    }
}

#[test]
fn smaller_tiles_in_fp8_are_near_the_reference_too() {
    on_sm90(&mut Relaxed(Near(tiled())));
}

/// Keys and values that are expanded by a matrix in FP8.
struct Expands(Case, Long);

impl Check for Expands {
    fn on<D: Device>(&mut self, device: &D) {
        self.1.check(device, &self.0, true);
    }
}

#[test]
fn keys_and_values_are_expanded_in_fp8() {
    on_cuda(&mut Expands(odd(), Long { before: 90, rows: 171 }));
    on_sm90(&mut Expands(Case::expanding().in_fp8(BLOCK), Long { before: 70, rows: 171 }));
}

/// The input of a product is rounded to FP8 when it is first read, and again when other values are in its buffer.
struct Rewritten(Case);

impl Check for Rewritten {
    fn on<D: Device>(&mut self, device: &D) {
        let (case, model) = (&self.0, self.0.load(device));
        let x = Numbers::new(4).vector(6 * case.hidden, 1.0);
        let (first, second) = x.split_at(3 * case.hidden);
        let linear = |x: &D::Buffer| bits(&output(device, 3 * case.vocab, |y| device.linear(x, &model.lm_head, y)));
        let [one, other] = [first, second].map(|x| linear(&buffer(device, x)));
        let mut changed = buffer(device, first);
        assert_eq!((linear(&changed), linear(&changed)), (one.clone(), one.clone()), "read twice");
        device.decode(&activation::encode(Dtype::Bf16, second), &mut changed);
        assert_eq!(linear(&changed), other, "written in bf16");
        let sum: Vec<f32> = first.iter().zip(second).map(|(a, b)| a + b).collect();
        let mut added = buffer(device, first);
        linear(&added);
        device.add(&mut added, &buffer(device, second));
        assert_eq!(linear(&added), linear(&buffer(device, &sum)), "changed in place");
        assert_ne!(one, other);
    }
}

#[test]
fn other_values_are_rounded_again() {
    on_cuda(&mut Rewritten(odd()));
    on_sm90(&mut Rewritten(tiled()));
}

#[test]
fn the_block_and_the_sizes_decide_which_kernels_serve() {
    let sm90 = kernels_of(Shim::sm90(1), &tiled(), false);
    let expected = [
        // Of a block whose gate is in FP8 and whose up is in bf16.
        "grouped_linear",
        "grouped_linear_fp8",
        "sm90_grouped_gated_fp8_128",
        "sm90_grouped_heads_128",
        "sm90_grouped_linear_128",
        "sm90_grouped_linear_fp8_128",
        "sm90_mla_splits",
        "sm90_quantize",
        "swiglu",
    ];
    assert_eq!(sm90, expected);
    let others = kernels_of(Shim::sm90(1), &Case { fp8: Some(ODD), ..tiled() }, false);
    assert!(others.iter().all(|kernel| !kernel.starts_with("sm90") || !kernel.contains("fp8")), "{others:?}");
    let plain = kernels_of(Shim::new(1), &tiled(), false);
    for kernel in ["grouped_linear_fp8", "linear_fp8", "quantize"] {
        assert!(plain.contains(&kernel.to_owned()), "{kernel} in {plain:?}");
    }
}

#[test]
fn a_matrix_in_fp8_takes_a_byte_an_element_and_its_scales() {
    for shim in [Shim::new(1), Shim::sm90(1)] {
        let device = Cuda::new(shim);
        let values = Numbers::new(2).vector(300 * 272, 1.0);
        let load = |case: Case| {
            let stored = Stored::new(&case, &values, 272);
            device.matrix_bytes(&device.load_matrix(stored.weight()).unwrap())
        };
        assert_eq!(load(tiled()), 300 * 272 + 3 * 3 * 4);
        assert_eq!(load(Case::tiled()), 300 * 272 * 2);
        // A part that begins within a block, and a transpose, are widened.
        let stored = Stored::new(&tiled(), &values, 272);
        for part in [stored.weight().slice(100, 50), stored.weight().slice(128, 50).transpose()] {
            assert_eq!(device.matrix_bytes(&device.load_matrix(part).unwrap()), 50 * 272 * 2);
        }
        let whole_blocks = device.load_matrix(stored.weight().slice(128, 50)).unwrap();
        assert_eq!(device.matrix_bytes(&whole_blocks), 50 * 272 + 3 * 4);
    }
}

#[test]
fn gate_logits_of_a_matrix_in_fp8_are_refused() {
    let (device, case) = (Cuda::new(Shim::new(1)), odd());
    let model = case.load(&device);
    let (x, mut y) = (buffer(&device, &vec![1.0; case.hidden]), buffer(&device, &[0.0]));
    device.gate_logits(&x, &model.lm_head, &mut y);
    let message = "the device has failed: gate logits: found a matrix in FP8, expected one in bf16";
    assert_eq!(device.read(&mut y, &mut Vec::new()).unwrap_err().to_string(), message);
}
