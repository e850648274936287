//! The golden files, read.

use std::{fs, path::PathBuf};

use conclave_tests::root;
use safetensors::SafeTensors;

/// One tiny checkpoint.
pub(crate) struct Case {
    /// Folder name.
    pub(crate) name: String,
    /// Folder.
    pub(crate) dir: PathBuf,
    /// Width of the logits.
    pub(crate) vocab: usize,
    /// Its sequences.
    pub(crate) sequences: Vec<Sequence>,
}

/// One sequence with what transformers computed for it.
pub(crate) struct Sequence {
    /// Token ids.
    pub(crate) ids: Vec<u32>,
    /// `[T, vocab]`
    pub(crate) logits: Vec<f32>,
    /// By absolute layer: chosen experts `[T, K]`, empty where the layer is dense.
    pub(crate) experts: Vec<Vec<u32>>,
}

/// A sequence of the demo checkpoint.
pub(crate) struct Demo {
    /// Token ids.
    pub(crate) ids: Vec<u32>,
    /// First position of `logits`.
    pub(crate) start: usize,
    /// `[T - start, vocab]`
    pub(crate) logits: Vec<f32>,
    /// The likeliest next token after each position.
    pub(crate) argmax: Vec<usize>,
    /// Log probability of the actual next token.
    pub(crate) logprob: Vec<f32>,
}

fn fixtures() -> PathBuf {
    root().join("tests/fixtures")
}

/// All cases, by name.
pub(crate) fn cases() -> Vec<Case> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(fixtures().join("golden")).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    assert!(dirs.len() >= 8, "{dirs:?}");
    dirs.into_iter().map(case).collect()
}

fn case(dir: PathBuf) -> Case {
    let bytes = fs::read(dir.join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let sequences: Vec<Sequence> = (0..).map_while(|i| sequence(&golden, i)).collect();
    let vocab = golden.tensor("logits.0").unwrap().shape()[1];
    Case { name: dir.file_name().unwrap().to_string_lossy().into_owned(), dir, vocab, sequences }
}

fn sequence(golden: &SafeTensors<'_>, i: usize) -> Option<Sequence> {
    let ids = integers(golden, &format!("ids.{i}"))?;
    let experts = |layer| integers(golden, &format!("experts.{i}.{layer}")).unwrap_or_default();
    Some(Sequence { ids, logits: floats(golden, &format!("logits.{i}")), experts: (0..8).map(experts).collect() })
}

/// The demo checkpoint's sequences.
pub(crate) fn demo_sequences() -> Vec<Demo> {
    let bytes = fs::read(fixtures().join("golden-demo/golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let demo = |i: usize| {
        Some(Demo {
            ids: integers(&golden, &format!("ids.{i}"))?,
            start: integers(&golden, &format!("start.{i}"))?[0] as usize,
            logits: floats(&golden, &format!("logits.{i}")),
            argmax: integers(&golden, &format!("argmax.{i}"))?.into_iter().map(|id| id as usize).collect(),
            logprob: floats(&golden, &format!("logprob.{i}")),
        })
    };
    (0..).map_while(demo).collect()
}

fn integers(golden: &SafeTensors<'_>, name: &str) -> Option<Vec<u32>> {
    let tensor = golden.tensor(name).ok()?;
    let of = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().unwrap()).try_into().unwrap();
    Some(tensor.data().chunks_exact(8).map(of).collect())
}

fn floats(golden: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = golden.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}
