//! Attention over expanded keys and values, and what it begins and ends with.

use conclave_kernels::{
    Dtype,
    cuda::plain::{FinishExpanded, GatherLatents, MlaExpanded, RopeQueries},
};

use crate::{
    expanded_case::{Filled, SCALE, Sizes},
    support::{Numbers, assert_close, run},
};

/// Sums `[R, n, 2 + dv]` over chunks of so many keys.
fn sums(case: &Filled, chunk: usize) -> Vec<f32> {
    let Sizes { heads, nope, rope, value, latent, position, rows } = case.sizes;
    run(|rig| {
        let [q, cache] = [&case.q, &case.cache].map(|values| rig.upload_bf16(values));
        let (kv, blocks) = (rig.upload(&case.kv), rig.upload(&case.blocks));
        let length = rows * heads * (2 + value);
        let sums = rig.poisoned::<f32>(length);
        for first in (0..case.sizes.keys()).step_by(chunk) {
            MlaExpanded {
                q: rig.at(&q),
                kv: rig.at(&kv) + (first * heads * (nope + value) * 4) as u64,
                cache: rig.at(&cache),
                blocks: rig.at(&blocks),
                sums: rig.at(&sums),
                position: position as u32,
                first: first as u32,
                count: chunk.min(case.sizes.keys() - first) as u32,
                fresh: u32::from(first == 0),
                nope: nope as u32,
                rope: rope as u32,
                value: value as u32,
                latent: latent as u32,
                scale: SCALE,
                rows: rows as u32,
                heads: heads as u32,
            }
            .launch(&rig.driver)?;
        }
        Ok(rig.download(&sums, length))
    })
}

/// More keys than are attended to at once, chunks of which early rows see nothing, values of more elements than threads.
#[test]
fn rows_attend_to_what_is_before_them_in_any_chunks() {
    let odd = Sizes { heads: 3, nope: 10, rope: 6, value: 13, latent: 5, position: 0, rows: 70 };
    for (sizes, chunk) in [
        (odd, 64),
        (Sizes { position: 290, rows: 9, ..odd }, 320),
        (Sizes { position: 60, rows: 140, heads: 1, value: 150, ..odd }, 128),
    ] {
        let case = sizes.fill(4);
        case.check(&sums(&case, chunk), 1e-5);
    }
}

#[test]
fn sums_become_means() {
    let (rows, heads, value) = (3usize, 2usize, 7usize);
    let sums: Vec<f32> = (0..rows * heads * (2 + value)).map(|at| at as f32 + 1.0).collect();
    let expected: Vec<f64> = sums
        .chunks(2 + value)
        .flat_map(|sums| sums[2..].iter().map(|sum| f64::from(sum / sums[1])).collect::<Vec<_>>())
        .collect();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let found = run(|rig| {
            let (sums, out) = (rig.upload(&sums), rig.poisoned::<f32>(rows * heads * value));
            let (rows, heads, of) = (rows as u32, heads as u32, value as u32);
            FinishExpanded { sums: rig.at(&sums), out: rig.at(&out), value: of, dtype, rows, heads }
                .launch(&rig.driver)?;
            let length = expected.len();
            Ok(if dtype == Dtype::F32 { rig.download(&out, length) } else { rig.download_bf16(&out, length) })
        });
        assert_close(&found, &expected, if dtype == Dtype::F32 { 1e-6 } else { 4e-3 }, "means");
    }
}

#[test]
fn latents_are_gathered_and_followed_by_zeros() {
    let (latent, width, blocks) = (9usize, 13usize, [2u32, 0]);
    let cache: Vec<f32> = (0..3 * 64 * width).map(|at| (at % 251) as f32).collect();
    let (first, count, rows) = (62usize, 4usize, 6usize);
    let found = run(|rig| {
        let (cache, blocks, out) = (rig.upload_bf16(&cache), rig.upload(&blocks), rig.poisoned::<u16>(rows * latent));
        GatherLatents {
            cache: rig.at(&cache),
            blocks: rig.at(&blocks),
            out: rig.at(&out),
            first: first as u32,
            count: count as u32,
            latent: latent as u32,
            width: width as u32,
            rows: rows as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download_bf16(&out, rows * latent))
    });
    let slots = [2 * 64 + 62, 2 * 64 + 63, 0, 1];
    let mut expected: Vec<f32> = slots.iter().flat_map(|slot| cache[slot * width..][..latent].to_vec()).collect();
    expected.resize(rows * latent, 0.0);
    assert_eq!(found, expected);
}

#[test]
fn queries_are_roped_and_turned_head_by_head() {
    let (rows, heads, nope, rope) = (3usize, 2usize, 5usize, 4usize);
    let mut numbers = Numbers::new(2);
    let q = numbers.vector(rows * heads * (nope + rope), 1.0);
    let (cos, sin) = (numbers.vector(10 * rope / 2, 1.0), numbers.vector(10 * rope / 2, 1.0));
    let positions = [7u32, 8, 9];
    let found = run(|rig| {
        let (q, cos, sin) = (rig.upload(&q), rig.upload(&cos), rig.upload(&sin));
        let (positions, out) = (rig.upload(&positions), rig.poisoned::<u16>(rows * heads * (nope + rope)));
        RopeQueries {
            q: rig.at(&q),
            cos: rig.at(&cos),
            sin: rig.at(&sin),
            positions: rig.at(&positions),
            out: rig.at(&out),
            nope: nope as u32,
            rope: rope as u32,
            rows: rows as u32,
            heads: heads as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download_bf16(&out, rows * heads * (nope + rope)))
    });
    let mut expected = Vec::new();
    for head in 0..heads {
        for (row, position) in positions.iter().enumerate() {
            let q = &q[(row * heads + head) * (nope + rope)..][..nope + rope];
            expected.extend(q[..nope].iter().map(|x| f64::from(*x)));
            for pair in 0..rope / 2 {
                let at = *position as usize * rope / 2 + pair;
                let [even, odd, cos, sin] =
                    [q[nope + 2 * pair], q[nope + 2 * pair + 1], cos[at], sin[at]].map(f64::from);
                expected.extend([even * cos - odd * sin, odd * cos + even * sin]);
            }
        }
    }
    assert_close(&found, &expected, 8e-3, "queries");
}
