//! What is measured: true sizes for a GPU, small ones for the shim.

use std::ops::Range;

/// A model's MoE layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    /// Inner dimension of an expert.
    pub(crate) inner: usize,
    pub(crate) experts: usize,
}

/// A matrix of the trunk, `[outputs, inner]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) name: &'static str,
    pub(crate) outputs: usize,
    pub(crate) inner: usize,
}

/// Queries of latent attention: `rows` of each of `sequences`, which end at `context`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queries {
    pub(crate) heads: usize,
    pub(crate) sequences: usize,
    pub(crate) rows: usize,
    pub(crate) context: usize,
}

/// All sizes.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    /// Runs that count, and before them.
    pub(crate) runs: usize,
    pub(crate) warm_up: usize,
    /// Bytes that are read to learn the read rate, and to empty the second-level cache; rounds of products.
    pub(crate) read: usize,
    pub(crate) rounds: u32,
    /// Bytes of random numbers of each type, and elements after which they repeat: a prime number.
    pub(crate) bf16: usize,
    pub(crate) e4m3: usize,
    pub(crate) f32: usize,
    pub(crate) period: usize,
    /// Bytes for results.
    pub(crate) out: usize,
    pub(crate) models: Vec<Model>,
    /// Rows of each expert.
    pub(crate) tokens: Vec<usize>,
    pub(crate) queries: Vec<Queries>,
    pub(crate) trunk: Vec<Matrix>,
    /// Rows of a trunk's step, of norms and of products a head.
    pub(crate) rows: Vec<usize>,
    pub(crate) heads: Vec<usize>,
    pub(crate) vocab: usize,
    /// Rows of groups, ends of the inner dimension and of outputs, which bits are compared with.
    pub(crate) ragged: Vec<u32>,
    pub(crate) bits: Matrix,
    /// Side of the square product that a library is timed with.
    pub(crate) square: usize,
}

const fn matrix(name: &'static str, outputs: usize, inner: usize) -> Matrix {
    Matrix { name, outputs, inner }
}

fn decode(heads: &[usize], batches: &[usize], contexts: &[usize]) -> Vec<Queries> {
    let mut all = Vec::new();
    for heads in heads.iter().copied() {
        for context in contexts.iter().copied() {
            all.extend(batches.iter().map(|sequences| Queries { heads, sequences: *sequences, rows: 1, context }));
        }
    }
    all
}

impl Sizes {
    /// V2-Lite's and V2's.
    #[cfg(feature = "cuda")]
    pub(crate) fn full() -> Self {
        let prefill = |heads| Queries { heads, sequences: 1, rows: 512, context: 4096 };
        Self {
            runs: 11,
            warm_up: 2,
            read: 2 << 30,
            rounds: 10_000,
            bf16: 12 << 30,
            e4m3: 6 << 30,
            f32: 1 << 30,
            // The largest below 2^23.
            period: 8_388_593,
            out: 14 << 30,
            models: vec![
                Model { name: "V2-Lite", hidden: 2048, inner: 1408, experts: 64 },
                Model { name: "V2", hidden: 5120, inner: 1536, experts: 160 },
            ],
            tokens: vec![1, 16, 128, 1024, 4096],
            queries: [decode(&[16, 128], &[1, 32, 128], &[4096, 16384, 32768]), vec![prefill(16), prefill(128)]]
                .concat(),
            trunk: vec![
                matrix("V2-Lite q", 3072, 2048),
                matrix("V2-Lite kv_a", 576, 2048),
                matrix("V2-Lite o", 2048, 2048),
                matrix("V2-Lite lm_head", 102_400, 2048),
                matrix("V2 q_a", 1536, 5120),
                matrix("V2 q_b", 24_576, 1536),
                matrix("V2 kv_a", 576, 5120),
                matrix("V2 o", 5120, 16_384),
                matrix("V2 lm_head", 102_400, 5120),
            ],
            rows: vec![1, 32, 128, 4096],
            heads: vec![16, 128],
            vocab: 102_400,
            ragged: vec![0, 3, 17, 1, 66, 130, 0, 260, 512],
            bits: matrix("", 1408, 2048),
            square: 8192,
        }
    }

    /// Everything once, in small.
    pub(crate) fn small() -> Self {
        Self {
            runs: 2,
            warm_up: 1,
            read: 1 << 16,
            rounds: 1,
            bf16: 4 << 20,
            e4m3: 1 << 20,
            f32: 1 << 20,
            period: 65_521,
            out: 4 << 20,
            models: vec![Model { name: "small", hidden: 144, inner: 80, experts: 3 }],
            tokens: vec![1, 18],
            queries: [
                decode(&[16], &[1, 2], &[70, 576]),
                vec![Queries { heads: 16, sequences: 1, rows: 6, context: 70 }],
            ]
            .concat(),
            trunk: vec![matrix("small", 88, 72)],
            rows: vec![1, 3],
            heads: vec![16],
            vocab: 1000,
            ragged: vec![0, 3, 17, 1, 70],
            bits: matrix("", 72, 144),
            square: 64,
        }
    }
}

impl Queries {
    /// Positions that row `row` of all sees, its own included.
    pub(crate) fn keys(&self, row: usize) -> usize {
        self.context - self.rows + row % self.rows + 1
    }

    pub(crate) fn total(&self) -> usize {
        self.sequences * self.rows
    }

    /// Rows of sequence `sequence`.
    pub(crate) fn of(&self, sequence: usize) -> Range<usize> {
        sequence * self.rows..(sequence + 1) * self.rows
    }
}
