//! Random-weight checkpoints of true shapes, for measuring and for tests.
//!
//! Matrices are normal with a standard deviation of 0.02, norms are 1, all in bf16; or projections in FP8, with scales that are all
//! the same. Every tensor follows from the seed and its name alone. There is no tokenizer: such a checkpoint serves token ids.

mod plan;
mod random;

use std::fs::{self, File};
use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use half::bf16;
use plan::{Chunk, Content, ShardPlan};
use random::Normal;

use crate::config::presets;
use crate::sources::INDEX;
use crate::{BlockQuantization, ModelConfig, ModelError, sys};

/// Which model's shapes to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// DeepSeek-V2, 236B.
    V2,
    /// DeepSeek-V2-Lite, 16B.
    V2Lite,
    /// DeepSeek-V3, 671B.
    V3,
    /// V2's structure in about six megabytes.
    Tiny,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 4] = [Self::V2, Self::V2Lite, Self::V3, Self::Tiny];

    /// As a flag spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V2Lite => "v2-lite",
            Self::V3 => "v3",
            Self::Tiny => "tiny",
        }
    }

    /// The architecture.
    pub fn config(self) -> ModelConfig {
        match self {
            Self::V2 => presets::v2(),
            Self::V2Lite => presets::v2_lite(),
            Self::V3 => presets::v3(),
            Self::Tiny => presets::tiny(),
        }
    }
}

impl FromStr for Preset {
    type Err = SynthError;

    fn from_str(name: &str) -> Result<Self, SynthError> {
        let preset = Self::ALL.into_iter().find(|preset| preset.name() == name);
        preset.ok_or_else(|| SynthError::Preset { found: name.into() })
    }
}

/// Element types of what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SynthDtype {
    /// bf16 throughout.
    #[default]
    Bf16,
    /// Projections in FP8 with a scale for each block of 128 × 128, as V3 is released; the rest in bf16.
    Fp8,
}

impl SynthDtype {
    /// As a flag spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        }
    }
}

impl FromStr for SynthDtype {
    type Err = SynthError;

    fn from_str(name: &str) -> Result<Self, SynthError> {
        let dtype = [Self::Bf16, Self::Fp8].into_iter().find(|dtype| dtype.name() == name);
        dtype.ok_or_else(|| SynthError::Dtype { found: name.into() })
    }
}

/// What to write, and where.
#[derive(Debug, Clone)]
pub struct SynthOptions {
    /// Shapes.
    pub preset: Preset,
    /// Layers, where not the preset's.
    pub layers: Option<usize>,
    /// Vocabulary, where not the preset's.
    pub vocab: Option<usize>,
    /// Of the weights.
    pub dtype: SynthDtype,
    /// Decides all weights.
    pub seed: u64,
    /// Directory to write into: new or empty.
    pub out: PathBuf,
}

/// Why a checkpoint is not written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SynthError {
    /// A preset that is not known.
    #[error("preset: found {found:?}, expected \"v2\", \"v2-lite\", \"v3\" or \"tiny\"")]
    Preset { found: String },
    /// An element type that is not known.
    #[error("dtype: found {found:?}, expected \"bf16\" or \"fp8\"")]
    Dtype { found: String },
    /// A directory with something in it.
    #[error("{}: found {entry:?} in it, expected a new or empty directory", path.display())]
    NotEmpty { path: PathBuf, entry: String },
    /// Too little room.
    #[error("{}: {needed} bytes needed, {available} available on the disk", path.display())]
    DiskTooSmall { path: PathBuf, needed: u64, available: u64 },
    /// Asked to stop.
    #[error("{}: stopped before it was complete; what was written is removed", path.display())]
    Stopped { path: PathBuf },
}

/// What is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The architecture.
    pub config: ModelConfig,
    /// Bytes of all tensor files.
    pub bytes: u64,
    /// Tensor files.
    pub files: usize,
}

const CONFIG: &str = "config.json";

/// Of what is in FP8.
const BLOCK: BlockQuantization = BlockQuantization { rows: 128, cols: 128 };

/// Bytes of one tensor file, unless a single tensor is larger.
const SHARD_BYTES: u64 = 4 << 30;
/// Bytes made and written at once by one thread.
const CHUNK_BYTES: usize = 4 << 20;
/// More threads than this only wait for the disk.
const MAX_THREADS: usize = 16;

impl SynthOptions {
    /// The architecture that these options mean.
    ///
    /// # Errors
    /// When `layers` or `vocab` is out of bounds.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        let mut config = self.preset.config();
        config.layers = self.layers.unwrap_or(config.layers);
        config.vocab = self.vocab.unwrap_or(config.vocab);
        config.quantization = (self.dtype == SynthDtype::Fp8).then_some(BLOCK);
        if config.bos_token.into_iter().chain(config.eos_tokens.clone()).any(|id| id as usize >= config.vocab) {
            config.bos_token = Some(0);
            config.eos_tokens = vec![1];
        }
        let path = self.out.join(CONFIG);
        ModelConfig::parse(config.to_json().as_bytes()).map_err(|error| ModelError::Config { path, error })
    }

    /// What these options would write.
    ///
    /// # Errors
    /// As for [`SynthOptions::config`].
    pub fn plan(&self) -> Result<Written, ModelError> {
        let config = self.config()?;
        let shards = plan::plan(&config, SHARD_BYTES);
        let bytes = shards.iter().map(ShardPlan::file_bytes).sum();
        Ok(Written { config, bytes, files: shards.len() })
    }
}

/// Who watches the writing of a checkpoint. Asked and told from several threads.
pub trait Watch: Sync {
    /// `done` of `total` bytes are written.
    fn progress(&self, done: u64, total: u64);

    /// Whether to stop.
    fn stopped(&self) -> bool {
        false
    }
}

impl<F: Fn(u64, u64) + Sync> Watch for F {
    fn progress(&self, done: u64, total: u64) {
        self(done, total);
    }
}

/// Writes a checkpoint.
///
/// # Errors
/// When the options are out of bounds, the directory is not empty, the disk is too small, writing fails, or `watch`
/// says to stop. What was written until then is removed. Whatever ends the process, there is no `config.json`, which
/// would make it a checkpoint, before everything else is written.
pub fn write(options: &SynthOptions, watch: &dyn Watch) -> Result<Written, ModelError> {
    write_shards(options, SHARD_BYTES, watch)
}

fn write_shards(options: &SynthOptions, shard_bytes: u64, watch: &dyn Watch) -> Result<Written, ModelError> {
    let config = options.config()?;
    let is_new = !options.out.exists();
    let shards = plan::plan(&config, shard_bytes);
    prepare(&options.out, shards.iter().map(ShardPlan::file_bytes).sum())?;
    let written = write_files(options, &config, &shards, watch);
    if written.is_err() {
        clear(&options.out, &shards, is_new);
    }
    written
}

fn write_files(
    options: &SynthOptions,
    config: &ModelConfig,
    shards: &[ShardPlan],
    watch: &dyn Watch,
) -> Result<Written, ModelError> {
    let total = shards.iter().map(ShardPlan::file_bytes).sum();
    let writer = Writer { seed: options.seed, normal: Normal::new(), done: AtomicU64::new(0), total, watch };
    for shard in shards {
        let path = options.out.join(&shard.file);
        writer.write(&path, shard).map_err(ModelError::io(&path, "write"))?;
        if watch.stopped() {
            return Err(SynthError::Stopped { path: options.out.clone() }.into());
        }
    }
    if let Some(index) = plan::index(shards) {
        write_text(&options.out.join(INDEX), &index)?;
    }
    write_text(&options.out.join(CONFIG), &config.to_json())?;
    Ok(Written { config: config.clone(), bytes: total, files: shards.len() })
}

/// Removes what was written, as far as the system lets it, the configuration first; and the directory if it `is_new`.
fn clear(out: &Path, shards: &[ShardPlan], is_new: bool) {
    let files = shards.iter().map(|shard| shard.file.as_str());
    for name in [CONFIG, INDEX].into_iter().chain(files) {
        // A file that was not begun is not there; one that cannot be removed is harmless without a configuration.
        let _ = fs::remove_file(out.join(name));
    }
    if is_new {
        let _ = fs::remove_dir(out);
    }
}

/// Makes the directory; refuses one with something in it or on a disk that is too small.
fn prepare(out: &Path, needed: u64) -> Result<(), ModelError> {
    fs::create_dir_all(out).map_err(ModelError::io(out, "create the directory"))?;
    let mut entries = fs::read_dir(out).map_err(ModelError::io(out, "read the directory"))?;
    if let Some(entry) = entries.next() {
        let entry = entry.map_err(ModelError::io(out, "read the directory"))?;
        let entry = entry.file_name().to_string_lossy().into_owned();
        return Err(SynthError::NotEmpty { path: out.into(), entry }.into());
    }
    let available = sys::free_bytes(out).map_err(ModelError::io(out, "read the free space"))?;
    if available < needed {
        return Err(SynthError::DiskTooSmall { path: out.into(), needed, available }.into());
    }
    Ok(())
}

fn write_text(path: &Path, text: &str) -> Result<(), ModelError> {
    fs::write(path, text).map_err(ModelError::io(path, "write"))
}

/// What the threads that write have in common.
struct Writer<'a> {
    seed: u64,
    normal: Normal,
    /// Bytes written so far.
    done: AtomicU64,
    total: u64,
    watch: &'a dyn Watch,
}

impl Writer<'_> {
    fn advance(&self, bytes: u64) {
        self.watch.progress(self.done.fetch_add(bytes, Ordering::Relaxed) + bytes, self.total);
    }

    /// Writes one file; its chunks are made and written by as many threads as there are cores.
    fn write(&self, path: &Path, shard: &ShardPlan) -> io::Result<()> {
        let file = File::create_new(path)?;
        file.set_len(shard.file_bytes())?;
        file.write_all_at(&shard.header, 0)?;
        self.advance(shard.header.len() as u64);
        let chunks = shard.chunks(CHUNK_BYTES as u64);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = vec![0; CHUNK_BYTES];
            while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| !self.watch.stopped()) {
                let bytes = &mut buffer[..chunk.bytes as usize];
                fill(chunk, self.seed, &self.normal, bytes);
                file.write_all_at(bytes, shard.header.len() as u64 + chunk.begin)?;
                self.advance(chunk.bytes);
            }
            Ok(())
        };
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let results = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
            results.collect::<Vec<io::Result<()>>>().into_iter().collect()
        })
    }
}

fn fill(chunk: &Chunk<'_>, seed: u64, normal: &Normal, out: &mut [u8]) {
    let key = random::key(seed, chunk.name);
    match chunk.content {
        Content::Ones => random::repeat(bf16::ONE.to_le_bytes(), out),
        Content::Normal => normal.fill_bf16(key, chunk.first, out),
        Content::Fp8 => normal.fill_e4m3(key, chunk.first, out),
        Content::Scales => random::repeat(random::SCALE.to_le_bytes(), out),
    }
}

#[cfg(test)]
mod tests;
