//! `conclave synth`: a random-weight checkpoint of true shapes.

mod progress;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;
use conclave_kernels::Fp8Weights;
use conclave_model::{
    StoredSizes,
    sizes::Sizes,
    synth::{self, Preset, SynthDtype, SynthOptions, Watch, Written},
};
use conclave_serve::shutdown;
use tokio_util::sync::CancellationToken;

use super::{
    inspect::{Figures, NAMES, architecture, parts, parts_table, size_figures},
    print::{
        self, Style, fields,
        units::{bytes, count},
    },
};
use crate::process::blocking;
use progress::Progress;

/// Write a checkpoint of true shapes with random weights, for measuring and for tests.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  conclave synth --preset tiny --out /tmp/tiny\n  \
                        conclave synth --preset v2-lite --layers 4 --out /tmp/lite\n  \
                        conclave synth --preset v3 --layers 4 --dtype fp8 --out /tmp/v3\n  \
                        conclave synth --preset v2 --dry-run\n\n\
                        Every weight follows from the seed. There is no tokenizer: the checkpoint serves token ids.")]
pub struct SynthArgs {
    /// Whose shapes: v2 (236B), v2-lite (16B), v3 (671B), tiny (V2's structure in a few megabytes).
    #[arg(long, env = "CONCLAVE_SYNTH_PRESET", value_name = "v2|v2-lite|v3|tiny")]
    preset: Preset,
    /// Layers, where not the preset's.
    #[arg(long, env = "CONCLAVE_SYNTH_LAYERS", value_name = "N")]
    layers: Option<usize>,
    /// Vocabulary, where not the preset's.
    #[arg(long, env = "CONCLAVE_SYNTH_VOCAB", value_name = "N")]
    vocab: Option<usize>,
    /// Element type of the projections: bf16, or fp8 with a scale for each block of 128 x 128. The rest is in bf16.
    #[arg(long, env = "CONCLAVE_SYNTH_DTYPE", value_name = "bf16|fp8", default_value = "bf16")]
    dtype: SynthDtype,
    /// Decides all weights.
    #[arg(long, env = "CONCLAVE_SYNTH_SEED", value_name = "N", default_value = "0")]
    seed: u64,
    /// Directory to write into: new or empty.
    #[arg(long, env = "CONCLAVE_SYNTH_OUT", value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Print the sizes and write nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Writes what was asked for; Ctrl-C stops it and removes what was written.
///
/// # Errors
/// Naming the option, directory or disk that does not allow it.
pub async fn run(args: SynthArgs) -> Result<()> {
    let options = SynthOptions {
        preset: args.preset,
        layers: args.layers,
        vocab: args.vocab,
        dtype: args.dtype,
        seed: args.seed,
        out: args.out.unwrap_or_default(),
    };
    let plan = options.plan()?;
    if args.dry_run {
        print::stdout(&sizes(&plan, Style::of_stdout()))?;
        return Ok(());
    }
    let watcher =
        Watcher { progress: Progress::start(plan.bytes), stop: shutdown::on(shutdown::signals()?, shutdown::exit) };
    let out = options.out.display().to_string();
    let begin = Instant::now();
    let written = blocking("write the checkpoint", move || Ok(watcher.write(&options)?)).await?;
    print::stdout(&summary(&written, &out, begin.elapsed()))?;
    Ok(())
}

/// Shows the progress of a writing and stops it on a signal.
struct Watcher {
    progress: Progress,
    stop: CancellationToken,
}

impl Watcher {
    fn write(self, options: &SynthOptions) -> Result<Written, conclave_model::ModelError> {
        let written = synth::write(options, &self);
        self.progress.end();
        written
    }
}

impl Watch for Watcher {
    fn progress(&self, done: u64, _: u64) {
        self.progress.advance(done);
    }

    fn stopped(&self) -> bool {
        self.stop.is_cancelled()
    }
}

fn sizes(plan: &Written, style: Style) -> String {
    let stored = StoredSizes::default();
    let figures = Figures::new(&plan.config, &stored, Fp8Weights::Widened);
    let list = |entries: &[(&str, String)]| fields(entries, NAMES, print::WIDTH, style);
    let mut figures = size_figures(&figures);
    let dtype = if plan.config.quantization.is_some() { SynthDtype::Fp8 } else { SynthDtype::Bf16 }.name();
    figures.push(("on disk", format!("{} in {}, in {dtype}", bytes(plan.bytes), files(plan.files))));
    let table = parts_table(&parts(&plan.config, &stored, Fp8Weights::Widened), print::WIDTH, style);
    format!("{}\n{table}\n{}", list(&architecture(&plan.config)), list(&figures))
}

fn summary(written: &Written, out: &str, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-3);
    let parameters = count(Sizes::of(&written.config).total());
    let rate = written.bytes as f64 / 1e9 / seconds;
    format!(
        "wrote {out}: {parameters} parameters, {} in {}, {seconds:.2} s, {rate:.2} GB/s\n\n  conclave serve --model {out}\n",
        bytes(written.bytes),
        files(written.files),
    )
}

fn files(count: usize) -> String {
    if count == 1 { "1 file".to_owned() } else { format!("{count} files") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(preset: Preset) -> Written {
        let dtype = SynthDtype::Bf16;
        SynthOptions { preset, layers: None, vocab: None, dtype, seed: 0, out: PathBuf::new() }.plan().unwrap()
    }

    #[test]
    fn a_dry_run_shows_parts_and_files() {
        let text = sizes(&plan(Preset::V2Lite), Style::PLAIN);
        for line in [
            "on disk        31.4 GB in 8 files, in bf16",
            "routed experts  14,394,851,328",
            "total           15,706,484,224",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn the_summary_has_the_rate_and_what_to_do_next() {
        let written = Written { bytes: 3_000_000_000, files: 2, ..plan(Preset::Tiny) };
        let text = summary(&written, "/tmp/x", Duration::from_secs(2));
        assert!(text.contains(" parameters, 3.00 GB in 2 files, 2.00 s, 1.50 GB/s\n"), "{text}");
        assert!(text.ends_with("\n  conclave serve --model /tmp/x\n"), "{text}");
    }
}
