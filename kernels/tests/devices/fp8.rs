//! FP8 e4m3 as tests have it: values rounded in blocks, and rows as the CUDA device rounds them.

use std::sync::LazyLock;

use conclave_kernels::{BlockScales, Device, Dtype, Fp8Weights, Weight, activation};

use crate::support::{Check, Numbers, batch, bits, buffer, on_each_device, output, rows as positions};

/// The largest magnitude.
const LARGEST: f32 = 448.0;

/// The value of bits that are a number.
fn value(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

/// The bits of the nearest value; ties to even.
fn nearest(x: f32) -> u8 {
    static VALUES: LazyLock<Vec<f32>> = LazyLock::new(|| (0..0x7f).map(value).collect());
    let above = VALUES.partition_point(|value| *value < x.abs()).min(0x7e) as u8;
    let below = above.saturating_sub(1);
    let (up, down) = (VALUES[usize::from(above)] - x.abs(), x.abs() - VALUES[usize::from(below)]);
    let magnitude = if up < down || (up == down && above.is_multiple_of(2)) { above } else { below };
    if x.is_sign_negative() { magnitude | 0x80 } else { magnitude }
}

/// A matrix with a scale a block: its bits, and the scales `[ceil(rows / block.0), ceil(cols / block.1)]`.
pub(crate) fn blocks(values: &[f32], cols: usize, block: (usize, usize)) -> (Vec<u8>, Vec<f32>) {
    let per_row = cols.div_ceil(block.1);
    let of = |at: usize| at / cols / block.0 * per_row + at % cols / block.1;
    let mut scales = vec![1e-9f32; (values.len() / cols).div_ceil(block.0) * per_row];
    for (at, value) in values.iter().enumerate() {
        scales[of(at)] = scales[of(at)].max(value.abs() / LARGEST);
    }
    let bits = values.iter().enumerate().map(|(at, value)| nearest(value / scales[of(at)])).collect();
    (bits, scales)
}

/// Rows `[_, inner]` as products in FP8 see them: rounded to bf16, then in units of a scale for each row and `width` elements.
pub(crate) fn rows(x: &[f32], inner: usize, width: usize) -> Vec<f32> {
    let mut x = x.to_vec();
    activation::round(Dtype::Bf16, &mut x);
    for row in x.chunks_exact_mut(inner) {
        for part in row.chunks_mut(width) {
            let largest = part.iter().fold(1e-4f32, |largest, x| largest.max(x.abs()));
            let (scale, inverse) = (largest / LARGEST, LARGEST / largest);
            part.iter_mut().for_each(|x| *x = value(nearest(*x * inverse)) * scale);
        }
    }
    x
}

#[test]
fn bits_are_those_of_the_nearest_value() {
    for bits in (0..0x7fu8).chain(0x80..0xff) {
        assert_eq!(nearest(value(bits)), bits);
    }
    assert_eq!([1000.0, -1000.0, 1.0625, 1.1875, 0.0].map(nearest), [0x7e, 0xfe, 0x38, 0x3a, 0]);
}

/// A matrix in FP8, in blocks that no device here keeps, is the matrix of its values; so is a part of it, a transpose, and a table.
struct Widens;

impl Check for Widens {
    fn on<D: Device>(&mut self, device: &D) {
        assert_ne!(device.fp8_weights(), Fp8Weights::Multiplied);
        let (outputs, inputs, block) = (70, 90, (32, 16));
        let (data, scales) = blocks(&Numbers::new(1).vector(outputs * inputs, 1.0), inputs, block);
        let of = |at: usize| at / inputs / block.0 * inputs.div_ceil(block.1) + at % inputs / block.1;
        let values: Vec<f32> = data.iter().enumerate().map(|(at, bits)| value(*bits) * scales[of(at)]).collect();
        let (scales, values) = (activation::encode(Dtype::F32, &scales), activation::encode(Dtype::F32, &values));
        let stored = Weight::fp8(&data, outputs, inputs, BlockScales::new(&scales, block)).unwrap();
        let wide = Weight::new(Dtype::F32, &values, outputs, inputs).unwrap();

        let both = [stored, wide]
            .map(|whole| [whole, whole.transpose(), whole.slice(20, 33), whole.slice(20, 33).transpose()]);
        for (stored, wide) in both[0].into_iter().zip(both[1]) {
            let (out, inner) = stored.shape();
            let [found, expected] = [stored, wide].map(|weight| {
                let matrix = device.load_matrix(weight).unwrap();
                let x = buffer(device, &Numbers::new(2).vector(3 * inner, 1.0));
                (device.matrix_bytes(&matrix), bits(&output(device, 3 * out, |y| device.linear(&x, &matrix, y))))
            });
            assert!(found == expected, "{out} x {inner}, {}", device.numerics());
        }
        let tokens = batch(device, positions::<D>(0..5, &[0]));
        let [found, expected] = [stored, wide].map(|weight| {
            let table = device.load_table(weight).unwrap();
            bits(&output(device, 5 * inputs, |out| device.embed(&table, &tokens, out)))
        });
        assert!(found == expected, "a table, {}", device.numerics());
    }
}

#[test]
fn where_they_are_widened_weights_in_fp8_are_their_values() {
    on_each_device(2, &mut Widens);
}
