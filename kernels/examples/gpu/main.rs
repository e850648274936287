//! Measures a GPU and each kernel on it, beside the least time that it could take there, and compares some of its results with
//! their definition in f64. On a machine with a GPU, built with the features `cuda,cuda-shim`:
//!
//! ```sh
//! cargo run --release -p conclave-kernels --features cuda,cuda-shim --example gpu -- --json gpu.json
//! ```
//!
//! The floor of a kernel is the larger of its bytes by the read rate and its operations by the rate of products, both measured
//! first. Times are medians by the GPU's clock, each run after reading more than fits into the second-level cache. `--shim`
//! runs all of it in small on the processor: the figures then mean nothing, but nothing of it is new to the GPU's time.

mod attention;
mod bits;
mod card;
mod expanded;
mod grouped;
#[cfg(feature = "cuda")]
mod library;
mod numbers;
mod products;
mod report;
mod rows;
mod runner;
mod sizes;

use std::{fmt, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};
use conclave_kernels::cuda::{Driver, Shim};
use serde::Serialize;

use runner::{Options, Runner, Stop};
use sizes::Sizes;

/// Measure a GPU and the kernels on it.
#[derive(Debug, Parser)]
struct Args {
    /// What is measured, in this order [default: all].
    #[arg(long, value_name = "PART", value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Longest time of all of it; what is left then is skipped.
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    seconds: u64,
    /// Write everything that was found there, anew after each line.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take this for the peak of products, in TFLOP/s, instead of measuring it.
    #[arg(long, value_name = "TFLOPS")]
    peak: Option<f64>,
    /// Everything in small, on the processor.
    #[arg(long)]
    shim: bool,
}

/// What is measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// Memory, copies, launches, products.
    Card,
    /// What gives the same bits.
    Bits,
    /// Latent attention.
    Attention,
    /// Grouped products.
    Experts,
    /// Products of the trunk.
    Trunk,
    /// Grouped products in FP8.
    Fp8,
    /// Norms, latents, products a head, draws.
    Rows,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().ok_or(fmt::Error)?.get_name())
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match measure_on(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            eprintln!("{failures} failed");
            ExitCode::FAILURE
        }
        Err(Stop::Skip(why) | Stop::Failed(why)) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// On the device that was asked for; how many cases failed.
fn measure_on(args: &Args) -> Result<usize, Stop> {
    let budget = Duration::from_secs(args.seconds);
    let options = Options { budget, json: args.json.clone(), peak: args.peak.map(|peak| peak * 1e12) };
    match args.shim {
        true => Ok(measure(Runner::new(Shim::sm90(1), Sizes::small(), options)?, &args.only)),
        false => on_gpu(args, options),
    }
}

#[cfg(feature = "cuda")]
fn on_gpu(args: &Args, options: Options) -> Result<usize, Stop> {
    use conclave_kernels::cuda::{Gpu, GpuOptions};

    let gpu = Gpu::new(&GpuOptions::default())?;
    let mut runner = Runner::new(gpu, Sizes::full(), options)?;
    library::attach(&mut runner);
    Ok(measure(runner, &args.only))
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_args: &Args, _options: Options) -> Result<usize, Stop> {
    Err(Stop::Skip("built without the feature cuda: only --shim is there".to_owned()))
}

/// The parts that are wanted, all if none is; how many cases failed.
fn measure<D: Driver>(mut runner: Runner<D>, only: &[Part]) -> usize {
    runner.report.head();
    for part in if only.is_empty() { Part::value_variants() } else { only } {
        runner.begin(*part);
        match part {
            Part::Card => card::measure(&mut runner),
            Part::Bits => bits::ask(&mut runner),
            Part::Attention => attention::measure(&mut runner),
            Part::Experts => {
                grouped::experts(&mut runner, false);
                grouped::plain_experts(&mut runner);
            }
            Part::Trunk => grouped::trunk(&mut runner),
            Part::Fp8 => grouped::experts(&mut runner, true),
            Part::Rows => rows::measure(&mut runner),
        }
    }
    runner.report.failures()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every case on the shim, none of which may be skipped, with all results right and the same bits throughout.
    #[test]
    fn everything_is_measured() {
        let json = std::env::temp_dir().join(format!("conclave-gpu-{}.json", std::process::id()));
        let args = Args { only: Vec::new(), seconds: 3600, json: Some(json.clone()), peak: None, shim: true };
        assert_eq!(measure_on(&args).map_err(|stop| format!("{stop:?}")), Ok(0));
        let text = std::fs::read_to_string(&json).unwrap();
        std::fs::remove_file(&json).unwrap();
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        let (rows, answers) = (found["rows"].as_array().unwrap(), found["answers"].as_array().unwrap());
        for row in rows {
            assert_eq!(row["state"], "measured", "{row}");
        }
        for part in Part::value_variants().iter().filter(|part| **part != Part::Bits) {
            assert!(rows.iter().any(|row| row["part"] == part.to_string()), "{part}");
        }
        assert!(answers.len() > 20, "{answers:#?}");
        for answer in answers {
            assert_eq!(answer["yes"], true, "{answer}");
        }
    }

    #[test]
    fn what_there_is_no_time_for_is_skipped() {
        let options = Options { peak: Some(1e12), ..Options::default() };
        let runner = Runner::new(Shim::sm90(1), Sizes::small(), options).map_err(|_| "a runner").unwrap();
        assert_eq!(measure(runner, &[Part::Trunk]), 0);
    }
}
