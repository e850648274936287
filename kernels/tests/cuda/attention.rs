//! Attention over the latent cache, with ragged sequences, scattered blocks and NaN in every slot that no row may see.

use conclave_kernels::{
    Dtype, activation,
    cuda::plain::{MergeSplits, MlaSplits},
};

use crate::support::{Numbers, assert_close, run};

const PAGE: usize = 64;

/// Sequences of so many positions in the cache, of each of which the last rows are asked for.
struct Case {
    heads: usize,
    latent: usize,
    rope: usize,
    /// Positions and rows.
    sequences: Vec<(usize, usize)>,
}

/// A case with numbers.
struct Filled {
    /// `[T, n, r + dr]`
    q: Vec<f32>,
    /// `[slots, r + dr]`
    cache: Vec<f32>,
    sequences: Vec<u32>,
    keys: Vec<u32>,
    first_block: Vec<u32>,
    blocks: Vec<u32>,
}

const SCALE: f32 = 0.21;

impl Case {
    fn width(&self) -> usize {
        self.latent + self.rope
    }

    fn fill(&self, seed: u64) -> Filled {
        let mut numbers = Numbers::new(seed);
        let pages: Vec<usize> = self.sequences.iter().map(|(positions, _)| positions.div_ceil(PAGE)).collect();
        let total = pages.iter().sum::<usize>() + 2;
        let blocks = numbers.distinct(total - 2, total as u32);
        let mut cache = vec![f32::NAN; total * PAGE * self.width()];
        let (mut sequences, mut keys, mut first_block, mut first) = (vec![], vec![], vec![], 0);
        for (sequence, (positions, rows)) in self.sequences.iter().enumerate() {
            first_block.push(first as u32);
            for position in 0..*positions {
                let slot = blocks[first + position / PAGE] as usize * PAGE + position % PAGE;
                cache[slot * self.width()..][..self.width()].copy_from_slice(&numbers.rounded(self.width(), 1.0));
            }
            sequences.extend(vec![sequence as u32; *rows]);
            keys.extend((positions - rows + 1..=*positions).map(|keys| keys as u32));
            first += pages[sequence];
        }
        let q = numbers.vector(keys.len() * self.heads * self.width(), 1.0);
        Filled { q, cache, sequences, keys, first_block, blocks }
    }

    /// `[T, n, r]` in double precision.
    fn expected(&self, filled: &Filled) -> Vec<f64> {
        let (mut out, mut q) = (Vec::new(), filled.q.clone());
        activation::round(Dtype::Bf16, &mut q);
        for (index, q) in q.chunks_exact(self.width()).enumerate() {
            let row = index / self.heads;
            let pages = &filled.blocks[filled.first_block[filled.sequences[row] as usize] as usize..];
            let key = |position: usize| {
                let slot = pages[position / PAGE] as usize * PAGE + position % PAGE;
                &filled.cache[slot * self.width()..][..self.width()]
            };
            let keys: Vec<&[f32]> = (0..filled.keys[row] as usize).map(key).collect();
            let score = |key: &[f32]| key.iter().zip(q).map(|(key, q)| f64::from(*key) * f64::from(*q)).sum::<f64>();
            let weights: Vec<f64> = keys.iter().map(|key| (score(key) * f64::from(SCALE)).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..self.latent).map(|at| {
                weights.iter().zip(&keys).map(|(weight, key)| weight * f64::from(key[at])).sum::<f64>() / total
            }));
        }
        out
    }

    fn run(&self, filled: &Filled) -> Vec<f32> {
        let rows = filled.keys.len();
        let splits = (*filled.keys.iter().max().unwrap() as usize).div_ceil(512);
        let length = rows * self.heads * self.latent;
        run(|rig| {
            let (q, cache) = (rig.upload(&filled.q), rig.upload_bf16(&filled.cache));
            let tables =
                [&filled.sequences, &filled.keys, &filled.first_block, &filled.blocks].map(|table| rig.upload(table));
            let [sequences, keys, first_block, blocks] = tables.each_ref().map(|table| rig.at(table));
            let parts = rig.poisoned::<f32>(rows * self.heads * splits * (self.latent + 2));
            let out = rig.poisoned::<f32>(length);
            let (rows, heads, splits) = (rows as u32, self.heads as u32, splits as u32);
            let (latent, rope) = (self.latent as u32, self.rope as u32);
            MlaSplits {
                q: rig.at(&q),
                cache: rig.at(&cache),
                sequences,
                keys,
                first_block,
                blocks,
                out: rig.at(&parts),
                heads,
                latent,
                rope,
                scale: SCALE,
                rows,
                splits,
            }
            .launch(&rig.driver)?;
            let (parts, narrow) = (rig.at(&parts), rig.poisoned::<u16>(length));
            let merge = |out, rounded| {
                MergeSplits { parts, keys, out, splits, latent, rounded, rows, heads }.launch(&rig.driver)
            };
            merge(rig.at(&out), false)?;
            merge(rig.at(&narrow), true)?;
            let found = rig.download::<f32>(&out, length);
            let mut expected = found.clone();
            activation::round(Dtype::Bf16, &mut expected);
            assert_eq!(rig.download_bf16(&narrow, length), expected, "merged and rounded");
            Ok(found)
        })
    }
}

fn check(case: &Case) {
    let filled = case.fill(case.latent as u64);
    assert_close(&case.run(&filled), &case.expected(&filled), 1e-5, "attention");
}

#[test]
fn ragged_sequences_of_odd_sizes() {
    check(&Case { heads: 3, latent: 37, rope: 6, sequences: vec![(1, 1), (70, 3), (700, 2), (513, 2), (512, 1)] });
    check(&Case { heads: 9, latent: 5, rope: 2, sequences: vec![(64, 64), (65, 1)] });
}

#[test]
fn heads_of_real_sizes() {
    check(&Case { heads: 16, latent: 512, rope: 64, sequences: vec![(80, 1), (9, 2)] });
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let case = Case { heads: 2, latent: 20, rope: 4, sequences: vec![(600, 3), (1100, 1), (3, 1)] };
    let filled = case.fill(7);
    let together = case.run(&filled);
    let (of_q, of_out) = (case.heads * case.width(), case.heads * case.latent);
    for row in 0..filled.keys.len() {
        let alone = Filled {
            q: filled.q[row * of_q..][..of_q].to_vec(),
            cache: filled.cache.clone(),
            sequences: vec![filled.sequences[row]],
            keys: vec![filled.keys[row]],
            first_block: filled.first_block.clone(),
            blocks: filled.blocks.clone(),
        };
        assert_eq!(case.run(&alone), together[row * of_out..][..of_out], "row {row}");
    }
}
