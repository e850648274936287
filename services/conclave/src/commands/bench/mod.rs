//! `conclave bench`: how fast a model is served, and how near that is to what the machine allows.

mod decoding;
mod hops;
mod limits;
mod machine;
mod measure;
mod mixed;
mod profile;
mod profiled;
mod progress;
mod prompts;
mod recorder;
mod report;
mod rig;
mod run;
mod stats;
mod table;
mod target;
mod timing;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use conclave_serve::{
    args::endpoint,
    telemetry::{self, LogFormat, TelemetryConfig},
};

use crate::process::{AttentionArgs, DeviceArgs, ModelArgs, in_process::SHARDS, range};

/// What the figures mean, for `--help`.
const FIGURES: &str = "\
Measure how fast a model is served: in this process, or by a running server or cluster

Prompts are random token ids, unlike those of any run before, which a server may have in its prefix cache; decoding is
greedy and goes on past any end of sequence.

  prefill      prompt tokens by the time from the request to its first token
  decode       tokens of all streams by the time during which all of them decode, no prefill in it;
               below it the time from one token of a stream to its next
  mixed        streams decode while prompts arrive, as fast as they could be computed alone: the time from one
               token of a stream to its next, in times of one prefill chunk alone; the time that the same prompts
               and the same output would take one after the other, by the time that they took together
  layer call   one row through one MoE layer of the model, from the gate logits to the sum
  hop          the same for a tiny model, so that little but the way is left. In process; embedded: dispatch
               beside the caller, the shard behind gRPC (two hops); through a router: both behind gRPC (four);
               over Unix sockets, as members of the same host talk, and over loopback TCP.
               Servers are in this process, on threads of their own
  ready        from opening the checkpoint to serving
  peak memory  resident, of all processes together

Beside each figure stands the best that this machine allows: the read bandwidth and the peak of multiply-adds of the
device that computes (the processor, or a GPU) are measured before and after each repetition, since others may share
the machine, and 'of limit' is the median over the repetitions; for the other figures the best of the whole run counts.
A step has to read each weight matrix that it needs once (routed experts: as many as are expected to be chosen) and the
latents that are attended to, and to do the operations of matrices and attention; whichever takes longer is the limit.
What stays in a large cache can be faster than that.";

/// Measure how fast a model is served: in this process, or by a running server or cluster.
#[derive(Debug, Args)]
#[command(
    long_about = FIGURES,
    after_help = "Examples:\n  conclave bench\n  conclave bench --model DIR --threads 2 --profile --json run.json\n  \
                  conclave bench --url http://127.0.0.1:50051 --model DIR --baseline run.json"
)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// Expert shards to run in this process, each with its part of the cells.
    #[arg(long, env = "CONCLAVE_SHARDS", value_name = "N", default_value = "1", value_parser = range::<u32>(SHARDS))]
    pub shards: u32,
    /// Measure the server with this gRPC address instead; with --model, its checkpoint, figures get their limits, which
    /// are those of this machine.
    #[arg(long, env = "CONCLAVE_BENCH_URL", value_name = "URL", value_parser = endpoint, conflicts_with = "profile")]
    pub url: Option<String>,
    /// API key of that server.
    #[arg(long, env = "CONCLAVE_API_KEY", value_name = "KEY", requires = "url", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Processes of that server on this machine, whose peak memory is shown.
    #[arg(long, env = "CONCLAVE_BENCH_PIDS", value_name = "PIDS", value_delimiter = ',', requires = "url")]
    pub pids: Vec<u32>,
    /// Prompt lengths whose prefill is measured.
    #[arg(
        long,
        env = "CONCLAVE_BENCH_PREFILL",
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "512,2048"
    )]
    pub prefill: Vec<usize>,
    /// Numbers of streams that decode at the same time.
    #[arg(long, env = "CONCLAVE_BENCH_BATCH", value_name = "STREAMS", value_delimiter = ',', default_value = "1,8,32")]
    pub batch: Vec<usize>,
    /// Prompt tokens of each stream that decodes.
    #[arg(long, env = "CONCLAVE_BENCH_CONTEXT", value_name = "TOKENS", default_value = "128")]
    pub context: usize,
    /// Prompt tokens of one more measurement of a single stream; 0: none.
    #[arg(long, env = "CONCLAVE_BENCH_LONG_CONTEXT", value_name = "TOKENS", default_value = "2048")]
    pub long_context: usize,
    /// Decode steps of each measurement.
    #[arg(long, env = "CONCLAVE_BENCH_TOKENS", value_name = "TOKENS", default_value = "32")]
    pub tokens: usize,
    #[command(flatten)]
    pub mixed: mixed::MixedArgs,
    /// Decides the prompts, for runs with the same ones [default: the time].
    #[arg(long, env = "CONCLAVE_BENCH_SEED", value_name = "SEED")]
    pub seed: Option<u64>,
    /// Repetitions of each measurement.
    #[arg(long, env = "CONCLAVE_BENCH_REPEAT", value_name = "N", default_value = "3")]
    pub repeat: usize,
    /// Longest time of each measurement, its repetitions together, in seconds.
    #[arg(long, env = "CONCLAVE_BENCH_LIMIT", value_name = "SECONDS", default_value = "120")]
    pub limit: u64,
    /// Show where the time of a prefill chunk and of decode steps goes, operation by operation.
    #[arg(long, env = "CONCLAVE_BENCH_PROFILE")]
    pub profile: bool,
    /// Write everything that was found, with all samples, as JSON.
    #[arg(long, env = "CONCLAVE_BENCH_JSON", value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Show each figure as a multiple of the same one of an earlier run, written by --json.
    #[arg(long, env = "CONCLAVE_BENCH_BASELINE", value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// What is logged: a level, or directives such as `warn,conclave_router=debug`.
    #[arg(long, env = "CONCLAVE_LOG", value_name = "FILTER", default_value = "warn")]
    pub log: String,
}

/// Measures and prints.
///
/// # Errors
/// Naming what could not be had, or the request that failed.
pub async fn run(args: BenchArgs) -> Result<()> {
    args.check()?;
    let baseline = args.baseline.as_deref().map(report::read_figures).transpose()?;
    let guard = telemetry::init(&TelemetryConfig {
        log_format: LogFormat::Text,
        log: args.log.clone(),
        otlp_endpoint: None,
        service: "conclave".to_owned(),
        instance: "bench".to_owned(),
    })?;
    let report = run::run(&args).await;
    guard.shutdown().await;
    let report = report?;
    print!("{}", table::render(&report, baseline.as_deref()));
    args.json.as_deref().map_or(Ok(()), |path| report.write(path))
}

impl BenchArgs {
    fn check(&self) -> Result<()> {
        let positive = [
            ("--prefill", self.prefill.iter().min()),
            ("--batch", self.batch.iter().min()),
            ("--context", Some(&self.context)),
            ("--tokens", Some(&self.tokens)),
            ("--mixed-streams", Some(&self.mixed.mixed_streams)),
            ("--mixed-prompts", Some(&self.mixed.mixed_prompts)),
            ("--repeat", Some(&self.repeat)),
        ];
        if let Some((flag, _)) = positive.iter().find(|(_, least)| *least == Some(&0)) {
            bail!("{flag}: found 0, expected at least 1");
        }
        if let Some(path) = &self.json
            && let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
            && !folder.is_dir()
        {
            bail!("--json: {}: found no such folder", folder.display());
        }
        if !(1..=3000).contains(&self.limit) {
            bail!("--limit: found {}, expected 1 to 3000", self.limit);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        bench: BenchArgs,
    }

    #[test]
    fn what_cannot_be_measured_is_refused_before_anything_is_loaded() {
        let refused = |args: &[&str]| {
            let args = Command::parse_from(std::iter::once(&"bench").chain(args)).bench;
            args.check().unwrap_err().to_string()
        };
        assert_eq!(refused(&["--batch", "1,0"]), "--batch: found 0, expected at least 1");
        assert_eq!(refused(&["--limit", "3001"]), "--limit: found 3001, expected 1 to 3000");
        assert_eq!(refused(&["--json", "/no/where/x.json"]), "--json: /no/where: found no such folder");
        assert!(Command::parse_from(["bench", "--json", "x.json"]).bench.check().is_ok());
    }
}
