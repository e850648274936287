//! Operations on each element by itself.

use conclave_kernels::{
    Dtype, activation,
    cuda::plain::{Add, AddTwo, DecodeBf16, RoundBf16, Swiglu},
};

use crate::support::{Numbers, assert_close, run};

const SIZES: [usize; 4] = [0, 1, 257, 5000];

#[test]
fn rounding_is_to_nearest_even() {
    for n in SIZES {
        let mut x = Numbers::new(1).vector(n, 3.0);
        let special =
            [0.0, -0.0, f32::MAX, f32::INFINITY, f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000), 1e-40];
        x.iter_mut().zip(special).for_each(|(x, special)| *x = special);
        let found = run(|rig| {
            let (input, out) = (rig.upload(&x), rig.poisoned::<u16>(n));
            RoundBf16 { x: rig.at(&input), out: rig.at(&out), n: n as u64 }.launch(&rig.driver)?;
            Ok(rig.download::<u16>(&out, n))
        });
        let expected: Vec<u8> = activation::encode(Dtype::Bf16, &x);
        assert_eq!(bytemuck::cast_slice::<u16, u8>(&found), expected);
    }
}

#[test]
fn decoding_widens() {
    let x = Numbers::new(2).rounded(777, 3.0);
    let found = run(|rig| {
        let (input, out) = (rig.upload_bf16(&x), rig.poisoned::<f32>(777));
        DecodeBf16 { x: rig.at(&input), out: rig.at(&out), n: 777 }.launch(&rig.driver)?;
        Ok(rig.download::<f32>(&out, 777))
    });
    assert_eq!(found, x);
}

#[test]
fn residuals_are_added() {
    let mut numbers = Numbers::new(3);
    for n in SIZES {
        let [x, a, b] = std::array::from_fn(|_| numbers.vector(n, 2.0));
        let found = run(|rig| {
            let [x, a, b] = [&x, &a, &b].map(|values| rig.upload(values));
            Add { x: rig.at(&x), delta: rig.at(&a), n: n as u64 }.launch(&rig.driver)?;
            AddTwo { x: rig.at(&x), a: rig.at(&a), b: rig.at(&b), n: n as u64 }.launch(&rig.driver)?;
            Ok(rig.download::<f32>(&x, n))
        });
        let expected: Vec<f32> = (0..n).map(|at| (x[at] + a[at]) + (a[at] + b[at])).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn swiglu_is_near_its_definition() {
    let mut numbers = Numbers::new(4);
    let n = 3000;
    let (mut gate, up) = (numbers.vector(n, 20.0), numbers.vector(n, 3.0));
    gate[..4].copy_from_slice(&[-200.0, 200.0, -95.0, 0.0]);
    let found = run(|rig| {
        let [gate, up] = [&gate, &up].map(|values| rig.upload(values));
        let out = rig.poisoned::<u16>(n);
        Swiglu { gate: rig.at(&gate), up: rig.at(&up), out: rig.at(&out), n: n as u64 }.launch(&rig.driver)?;
        Ok(rig.download_bf16(&out, n))
    });
    let expected: Vec<f64> = (gate.iter().zip(&up))
        .map(|(gate, up)| f64::from(*gate) / (1.0 + (-f64::from(*gate)).exp()) * f64::from(*up))
        .collect();
    assert_close(&found, &expected, 1.0 / 256.0 + 1e-5, "swiglu");
}
