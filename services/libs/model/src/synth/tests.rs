//! Written checkpoints open, are what was asked for, and follow from the seed.

use std::sync::Mutex;

use super::*;
use crate::sizes::Sizes;
use crate::{Checkpoint, names, testing};

fn nothing() -> SynthOptions {
    let (preset, dtype) = (Preset::Tiny, SynthDtype::Bf16);
    SynthOptions { preset, layers: None, vocab: None, dtype, seed: 0, out: PathBuf::new() }
}

fn options(out: &Path) -> SynthOptions {
    SynthOptions { preset: Preset::Tiny, layers: Some(2), seed: 1, out: out.join("checkpoint"), ..nothing() }
}

fn open(options: &SynthOptions) -> Checkpoint {
    Checkpoint::open(options.out.to_str().unwrap()).unwrap()
}

fn written(change: impl FnOnce(&mut SynthOptions)) -> Checkpoint {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    change(&mut options);
    write(&options, &|_, _| ()).unwrap();
    open(&options)
}

#[test]
fn the_tiny_preset_opens_and_has_its_sizes() {
    let checkpoint = written(|options| options.layers = None);
    assert_eq!(checkpoint.config(), &Preset::Tiny.config());
    assert_eq!(checkpoint.total_bytes(), 2 * Sizes::of(checkpoint.config()).total());
    assert!(checkpoint.total_bytes() < 8 << 20, "{}", checkpoint.total_bytes());
    assert!(checkpoint.vector(&names::layer(0).kv_a_norm()).unwrap().iter().all(|gain| *gain == 1.0));
    assert!(checkpoint.text().unwrap().is_none());
    assert_eq!(checkpoint.generation().unwrap().eos, [1]);
}

#[test]
fn every_preset_is_sound_and_can_be_resized() {
    for preset in Preset::ALL {
        assert_eq!(preset.name().parse::<Preset>().unwrap(), preset);
        let options = SynthOptions { preset, layers: Some(3), vocab: Some(1000), ..nothing() };
        let config = options.config().unwrap();
        assert_eq!((config.layers, config.vocab), (3, 1000));
        assert!(config.eos_tokens.iter().all(|id| *id < 1000));
    }
    let error = "v9".parse::<Preset>().unwrap_err().to_string();
    assert!(error.contains("\"v9\"") && error.contains("v2-lite"), "{error}");
}

#[test]
fn projections_are_written_in_fp8_where_that_is_asked_for() {
    let (wide, checkpoint) = (written(|_| ()), written(|options| options.dtype = SynthDtype::Fp8));
    assert_eq!(checkpoint.config().quantization, Some(BLOCK));
    let names = names::layer(1);
    let name = names.expert(3).down_proj();
    let [found, expected] = [&checkpoint, &wide].map(|checkpoint| checkpoint.weight(&name).unwrap());
    let scales = found.scales.unwrap();
    assert_eq!((found.shape(), scales.block), (expected.shape(), (BLOCK.rows, BLOCK.cols)));
    assert_eq!(found.data.len() * 2, expected.data.len());
    assert!(scales.data.as_chunks().0.iter().all(|scale| *scale == random::SCALE.to_le_bytes()));
    for name in [names.gate(), names.input_norm(), names::embed(), names::lm_head()] {
        let [found, expected] = [&checkpoint, &wide].map(|checkpoint| checkpoint.weight(&name).unwrap());
        assert!(found.scales.is_none() && found.data == expected.data, "{name}");
    }
    assert!(checkpoint.total_bytes() < wide.total_bytes() * 2 / 3);
    assert_eq!("fp8".parse(), Ok(SynthDtype::Fp8));
    let error = "int4".parse::<SynthDtype>().unwrap_err().to_string();
    assert_eq!(error, "dtype: found \"int4\", expected \"bf16\" or \"fp8\"");
}

#[test]
fn weights_follow_from_the_seed_and_not_from_the_files() {
    let single = written(|_| ());
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let shape = write_shards(&options, 100_000, &|_, _| ()).unwrap();
    assert!(shape.files > 5, "{}", shape.files);
    assert!(options.out.join(format!("model-00001-of-{:06}.safetensors", shape.files)).exists());
    let sharded = open(&options);
    assert_eq!(sharded.fingerprint(), single.fingerprint());
    for tensor in single.tensors() {
        assert_eq!(testing::data(&sharded, tensor.name), testing::data(&single, tensor.name));
    }
    assert_ne!(written(|options| options.seed = 2).fingerprint(), single.fingerprint());
}

#[test]
fn progress_ends_at_the_total() {
    let dir = tempfile::tempdir().unwrap();
    let told = Mutex::new(Vec::new());
    let shape = write(&options(dir.path()), &|done, total| told.lock().unwrap().push((done, total))).unwrap();
    let mut told = told.into_inner().unwrap();
    told.sort_unstable();
    assert_eq!(told.last(), Some(&(shape.bytes, shape.bytes)));
}

/// Says to stop once bytes have been written.
#[derive(Default)]
struct StopEarly(std::sync::atomic::AtomicU64);

impl Watch for StopEarly {
    fn progress(&self, done: u64, _: u64) {
        self.0.store(done, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 300_000
    }
}

#[test]
fn a_writing_that_is_stopped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    for made_before in [false, true] {
        if made_before {
            fs::create_dir(&options.out).unwrap();
        }
        let error = write_shards(&options, 100_000, &StopEarly::default()).unwrap_err();
        assert!(matches!(error, ModelError::Synth(SynthError::Stopped { .. })), "{error}");
        assert_eq!(options.out.exists(), made_before, "a directory that was there stays");
        assert!(!made_before || fs::read_dir(&options.out).unwrap().next().is_none());
    }
    write(&options, &|_, _| ()).unwrap();
}

#[test]
fn a_plan_is_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let plan = options.plan().unwrap();
    assert!(!options.out.exists());
    assert_eq!(write(&options, &|_, _| ()).unwrap(), plan);
    let full = SynthOptions { preset: Preset::V2, layers: None, ..options };
    assert_eq!(full.plan().unwrap().files, 111, "4 GiB a file");
}

#[test]
fn a_directory_with_something_in_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    fs::create_dir(&options.out).unwrap();
    fs::write(options.out.join("precious"), "data").unwrap();
    let error = write(&options, &|_, _| ()).unwrap_err();
    assert!(matches!(&error, ModelError::Synth(SynthError::NotEmpty { entry, .. }) if entry == "precious"), "{error}");
    assert_eq!(fs::read_dir(&options.out).unwrap().count(), 1);
}

#[test]
fn a_checkpoint_larger_than_the_disk_is_refused_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let options = SynthOptions { preset: Preset::V2, layers: Some(30_000), ..options(dir.path()) };
    let error = write(&options, &|_, _| ()).unwrap_err();
    let ModelError::Synth(SynthError::DiskTooSmall { needed, available, .. }) = &error else { panic!("{error}") };
    assert!(needed > available && error.to_string().contains(&needed.to_string()), "{error}");
    assert_eq!(fs::read_dir(&options.out).unwrap().count(), 0);
}

#[test]
fn options_out_of_bounds_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (layers, vocab, field) in [(Some(0), None, "num_hidden_layers"), (None, Some(0), "vocab_size")] {
        let options = SynthOptions { layers, vocab, ..options(dir.path()) };
        let error = write(&options, &|_, _| ()).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("found 0"), "{error}");
    }
}
