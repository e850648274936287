//! Absorbed queries and values.

use conclave_kernels::{
    Dtype, activation,
    cuda::plain::{MlaQueries, MlaValues, SplitQueries},
};
use proptest::prelude::*;

use crate::{
    linear::chain,
    rows::{rotary, rotated},
    support::{Numbers, assert_close, run},
};

/// Heads, then sizes of a head.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    heads: usize,
    nope: usize,
    rope: usize,
    latent: usize,
    value: usize,
}

fn rounded(x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    activation::round(Dtype::Bf16, &mut x);
    x
}

fn queries(sizes: Sizes, seed: u64) {
    let Sizes { rows, heads, nope, rope, latent, .. } = sizes;
    let mut numbers = Numbers::new(seed);
    let (q, uk) = (numbers.vector(rows * heads * (nope + rope), 1.0), numbers.rounded(heads * latent * nope, 0.5));
    let positions: Vec<u32> = (0..rows).map(|_| numbers.below(100)).collect();
    let (table, length) = (rotary(rope), rows * heads * (latent + rope));
    let found = run(|rig| {
        let (q, uk, out) = (rig.upload(&q), rig.upload_bf16(&uk), rig.poisoned::<f32>(length));
        let (cos, sin, positions) = (rig.upload(&table.cos), rig.upload(&table.sin), rig.upload(&positions));
        MlaQueries {
            q: rig.at(&q),
            uk: rig.at(&uk),
            cos: rig.at(&cos),
            sin: rig.at(&sin),
            positions: rig.at(&positions),
            out: rig.at(&out),
            rows: rows as u32,
            nope: nope as u32,
            rope: rope as u32,
            latent: latent as u32,
            heads: heads as u32,
        }
        .launch(&rig.driver)?;
        let (nope_out, absorbed) = (rig.poisoned::<u16>(rows * heads * nope), rig.poisoned::<u16>(length));
        SplitQueries {
            q: rig.at(&q),
            cos: rig.at(&cos),
            sin: rig.at(&sin),
            positions: rig.at(&positions),
            nope_out: rig.at(&nope_out),
            absorbed: rig.at(&absorbed),
            nope: nope as u32,
            rope: rope as u32,
            latent: latent as u32,
            rows: rows as u32,
            heads: heads as u32,
        }
        .launch(&rig.driver)?;
        let (out, absorbed) = (rig.download::<f32>(&out, length), rig.download_bf16(&absorbed, length));
        Ok([out, absorbed, rig.download_bf16(&nope_out, rows * heads * nope)].concat())
    });
    let (found, split) = found.split_at(length);
    let (absorbed, nope_out) = split.split_at(length);
    let without_position = q.chunks_exact(nope + rope).flat_map(|q| rounded(&q[..nope])).collect::<Vec<f32>>();
    assert_eq!(nope_out, without_position, "split: {sizes:?}");
    for (whole, split) in found.chunks_exact(latent + rope).zip(absorbed.chunks_exact(latent + rope)) {
        assert!(split[..latent].iter().all(|value| value.is_nan()), "split: written where products write");
        assert_eq!(split[latent..], rounded(&whole[latent..]), "split: roped queries");
    }
    for (index, found) in found.chunks_exact(latent + rope).enumerate() {
        let (row, head) = (index / heads, index % heads);
        let q = &q[index * (nope + rope)..][..nope + rope];
        let uk = &uk[head * latent * nope..][..latent * nope];
        let expected: Vec<f32> = uk.chunks_exact(nope).map(|uk| chain(&rounded(&q[..nope]), uk)).collect();
        assert_eq!(found[..latent], expected, "row {row}, head {head} of {sizes:?}");
        assert_close(&found[latent..], &rotated(&q[nope..], &table, positions[row]), 1e-6, "roped queries");
    }
}

fn values(sizes: Sizes, seed: u64) {
    let Sizes { rows, heads, latent, value, .. } = sizes;
    let mut numbers = Numbers::new(seed);
    let (o_lat, uv) = (numbers.vector(rows * heads * latent, 1.0), numbers.rounded(heads * value * latent, 0.5));
    let found = run(|rig| {
        let (o_lat, uv) = (rig.upload(&o_lat), rig.upload_bf16(&uv));
        let out = rig.poisoned::<f32>(rows * heads * value);
        MlaValues {
            o_lat: rig.at(&o_lat),
            uv: rig.at(&uv),
            out: rig.at(&out),
            rows: rows as u32,
            latent: latent as u32,
            value: value as u32,
            heads: heads as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download::<f32>(&out, rows * heads * value))
    });
    for (index, found) in found.chunks_exact(value).enumerate() {
        let o_lat = rounded(&o_lat[index * latent..][..latent]);
        let uv = &uv[index % heads * value * latent..][..value * latent];
        let expected: Vec<f32> = uv.chunks_exact(latent).map(|uv| chain(&o_lat, uv)).collect();
        assert_eq!(found, expected, "row {}, head {} of {sizes:?}", index / heads, index % heads);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn heads_have_matrices_of_their_own(
        (rows, heads) in (1usize..20, 1usize..4),
        (nope, half) in (1usize..40, 0usize..5),
        (latent, value) in (1usize..80, 1usize..70),
        seed: u64,
    ) {
        let sizes = Sizes { rows, heads, nope, rope: 2 * half, latent, value };
        queries(sizes, seed);
        values(sizes, seed);
    }
}

#[test]
fn heads_of_real_sizes() {
    let sizes = Sizes { rows: 2, heads: 2, nope: 128, rope: 64, latent: 512, value: 128 };
    queries(sizes, 1);
    values(sizes, 2);
}
