//! Operations on rows: embedding, norm, gathering, combining, latents.

use conclave_kernels::{
    Dtype, RotaryTable, activation,
    cuda::plain::{AddSlots, CombinePairs, EmbedBf16, EmbedF32, GatherBf16, RmsNorm, WriteLatents},
};
use proptest::prelude::*;

use crate::support::{Numbers, assert_close, run};

#[test]
fn embedding_copies_rows() {
    let (vocab, hidden) = (19, 301);
    let table = Numbers::new(1).rounded(vocab * hidden, 1.0);
    let tokens = [18u32, 0, 7, 7, 3];
    let expected: Vec<f32> =
        tokens.iter().flat_map(|token| &table[*token as usize * hidden..][..hidden]).copied().collect();
    for narrow in [true, false] {
        let found = run(|rig| {
            let table = if narrow { rig.upload_bf16(&table) } else { rig.upload(&table) };
            let (tokens, out) = (rig.upload(&tokens), rig.poisoned::<f32>(expected.len()));
            let (table, tokens, out_at) = (rig.at(&table), rig.at(&tokens), rig.at(&out));
            match narrow {
                true => EmbedBf16 { table, tokens, out: out_at, hidden: 301, rows: 5 }.launch(&rig.driver)?,
                false => EmbedF32 { table, tokens, out: out_at, hidden: 301, rows: 5 }.launch(&rig.driver)?,
            }
            Ok(rig.download::<f32>(&out, expected.len()))
        });
        assert_eq!(found, expected);
    }
}

/// The norm of one row in double precision.
fn norm(x: &[f32], gain: &[f32], eps: f64) -> Vec<f64> {
    let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let factor = 1.0 / (squares / x.len() as f64 + eps).sqrt();
    x.iter().zip(gain).map(|(x, gain)| f64::from(*gain) * f64::from(*x) * factor).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn norms_are_near_their_definition(rows in 1usize..7, hidden in 1usize..900, seed: u64) {
        let mut numbers = Numbers::new(seed);
        let (x, gain) = (numbers.vector(rows * hidden, 3.0), numbers.vector(hidden, 1.5));
        let norm_of = |x: &[f32]| run(|rig| {
            let (input, gain, out) = (rig.upload(x), rig.upload(&gain), rig.poisoned::<f32>(x.len()));
            let (in_bf16, hidden, rows) = (rig.poisoned::<u16>(x.len()), hidden as u32, (x.len() / hidden) as u32);
            let [x_at, gain, out_at, rounded] = [&input, &gain, &out, &in_bf16].map(|memory| rig.at(memory));
            RmsNorm { x: x_at, gain, out: out_at, rounded, hidden, eps: 1e-3, rows }.launch(&rig.driver)?;
            let found = rig.download::<f32>(&out, x.len());
            let mut expected = found.clone();
            activation::round(Dtype::Bf16, &mut expected);
            assert_eq!(rig.download_bf16(&in_bf16, x.len()), expected, "rounded");
            Ok(found)
        });
        let found = norm_of(&x);
        let expected: Vec<f64> = x.chunks_exact(hidden).flat_map(|x| norm(x, &gain, 1e-3)).collect();
        assert_close(&found, &expected, 2e-6, "rms_norm");
        assert_eq!(norm_of(&x[..hidden]), &found[..hidden], "a row beside others and alone");
    }
}

#[test]
fn pairs_are_gathered_and_combined_in_order() {
    let (rows, pairs, slots, hidden) = (6usize, 11usize, 5usize, 133usize);
    let mut numbers = Numbers::new(3);
    let x = numbers.vector(rows * hidden, 2.0);
    let from: Vec<u32> = (0..pairs).map(|_| numbers.below(rows as u32)).collect();
    let found = run(|rig| {
        let (x, from, out) = (rig.upload_bf16(&x), rig.upload(&from), rig.poisoned::<u16>(pairs * hidden));
        let (hidden, pairs) = (hidden as u32, pairs as u32);
        GatherBf16 { x: rig.at(&x), rows: rig.at(&from), out: rig.at(&out), hidden, pairs }.launch(&rig.driver)?;
        Ok(rig.download_bf16(&out, (pairs * hidden) as usize))
    });
    let mut expected: Vec<f32> = from.iter().flat_map(|row| &x[*row as usize * hidden..][..hidden]).copied().collect();
    activation::round(Dtype::Bf16, &mut expected);
    assert_eq!(found, expected);

    // Slot 2 has no pairs; pairs lie in any order.
    let (y, weights, order) =
        (numbers.vector(pairs * hidden, 1.0), numbers.vector(pairs, 1.0), numbers.distinct(pairs, pairs as u32));
    let first = [0u32, 3, 4, 4, 9, 11];
    let found = run(|rig| {
        let (y, weights) = (rig.upload(&y), rig.upload(&weights));
        let (first, order, out) = (rig.upload(&first), rig.upload(&order), rig.poisoned::<u16>(slots * hidden));
        CombinePairs {
            y: rig.at(&y),
            weights: rig.at(&weights),
            first: rig.at(&first),
            pairs: rig.at(&order),
            out: rig.at(&out),
            hidden: hidden as u32,
            slots: slots as u32,
        }
        .launch(&rig.driver)?;
        Ok(rig.download_bf16(&out, slots * hidden))
    });
    let mut expected = vec![0.0; slots * hidden];
    for (slot, sums) in expected.chunks_exact_mut(hidden).enumerate() {
        for pair in &order[first[slot] as usize..first[slot + 1] as usize] {
            let pair = *pair as usize;
            sums.iter_mut().zip(&y[pair * hidden..]).for_each(|(sum, y)| *sum += weights[pair] * y);
        }
    }
    activation::round(Dtype::Bf16, &mut expected);
    assert_eq!(found, expected);
}

#[test]
fn slots_are_added_and_rounded() {
    let (slots, hidden) = (7usize, 261usize);
    let values = Numbers::new(11).rounded(slots * hidden, 3.0);
    let (into, from) = ([4u32, 0, 2], [1u32, 6, 3]);
    let found = run(|rig| {
        let (memory, into, from) = (rig.upload_bf16(&values), rig.upload(&into), rig.upload(&from));
        let (slots, into, from) = (rig.at(&memory), rig.at(&into), rig.at(&from));
        AddSlots { slots, into, from, hidden: hidden as u32, count: 3 }.launch(&rig.driver)?;
        Ok(rig.download_bf16(&memory, values.len()))
    });
    let mut expected = values.clone();
    for (into, from) in into.iter().zip(from) {
        for at in 0..hidden {
            expected[*into as usize * hidden + at] += values[from as usize * hidden + at];
        }
    }
    activation::round(Dtype::Bf16, &mut expected);
    assert_eq!(found, expected);
}

/// Rotates adjacent pairs, in double precision.
pub(crate) fn rotated(x: &[f32], rotary: &RotaryTable, position: u32) -> Vec<f64> {
    let half = x.len() / 2;
    let angle = |table: &[f32], pair: usize| f64::from(table[position as usize * half + pair]);
    let pairs = x.chunks_exact(2).enumerate().map(|(pair, x)| {
        let (cos, sin, even, odd) =
            (angle(&rotary.cos, pair), angle(&rotary.sin, pair), f64::from(x[0]), f64::from(x[1]));
        [even * cos - odd * sin, odd * cos + even * sin]
    });
    pairs.flatten().collect()
}

/// A table of 100 positions.
pub(crate) fn rotary(rope: usize) -> RotaryTable {
    let omega: Vec<f64> = (0..rope / 2).map(|pair| 100f64.powf(-2.0 * pair as f64 / rope as f64)).collect();
    RotaryTable::new(100, &omega, 1.1)
}

#[test]
fn latents_go_into_their_slots_alone() {
    for (latent, rope) in [(37, 6), (512, 64), (1, 2), (300, 0)] {
        let (rows, slots, width) = (5usize, 192usize, latent + rope);
        let mut numbers = Numbers::new(latent as u64);
        let (kv, gain) = (numbers.vector(rows * width, 2.0), numbers.vector(latent, 1.5));
        let at = numbers.distinct(rows, slots as u32);
        let positions: Vec<u32> = (0..rows).map(|_| numbers.below(100)).collect();
        let table = rotary(rope);
        let found = run(|rig| {
            let (kv, gain, cos, sin) =
                (rig.upload(&kv), rig.upload(&gain), rig.upload(&table.cos), rig.upload(&table.sin));
            let (positions, at, cache) = (rig.upload(&positions), rig.upload(&at), rig.poisoned::<u16>(slots * width));
            WriteLatents {
                kv: rig.at(&kv),
                gain: rig.at(&gain),
                cos: rig.at(&cos),
                sin: rig.at(&sin),
                positions: rig.at(&positions),
                slots: rig.at(&at),
                cache: rig.at(&cache),
                latent: latent as u32,
                rope: rope as u32,
                rows: rows as u32,
            }
            .launch(&rig.driver)?;
            Ok(rig.download_bf16(&cache, slots * width))
        });
        for (slot, found) in found.chunks_exact(width).enumerate() {
            let Some(row) = at.iter().position(|at| *at as usize == slot) else {
                assert!(found.iter().all(|value| value.is_nan()), "slot {slot} was not asked for");
                continue;
            };
            let kv = &kv[row * width..][..width];
            let mut expected = norm(&kv[..latent], &gain, 1e-6);
            expected.extend(rotated(&kv[latent..], &table, positions[row]));
            assert_close(found, &expected, 1.0 / 256.0 + 1e-5, "latents");
        }
    }
}
