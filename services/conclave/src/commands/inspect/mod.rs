//! `conclave inspect`: a checkpoint, or a running cluster.

mod architecture;
mod checkpoint;
mod checkpoint_text;
mod cluster;
mod cluster_text;
mod figures;
mod refusals;
mod view;
mod warnings;

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use conclave_model::{Survey, available_memory};
use conclave_serve::args::endpoint;
use serde::Serialize;

use super::print::{self, Style};
use crate::process::{DeviceKind, ModelArgs, blocking};
use checkpoint::Report;

pub use architecture::architecture;
pub use checkpoint_text::{NAMES, parts_table, size_figures};
pub use figures::{Figures, parts};

/// Look at a checkpoint (config, sizes, what would be refused and why) or at a running cluster.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  conclave inspect deepseek-ai/DeepSeek-V2-Lite-Chat\n  \
                        conclave inspect ./checkpoint --json\n  \
                        conclave inspect --cluster 127.0.0.1:50051 --watch\n\n\
                        A checkpoint that would be refused is shown as far as it can be read, and the exit code is 1.")]
pub struct InspectArgs {
    /// Checkpoint: a directory, or org/name in the local Hugging Face cache [default: the bundled demo checkpoint].
    #[arg(env = "CONCLAVE_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// Device whose memory the weights are counted for: matrices in FP8 stay so on cuda, and are widened to bf16 elsewhere.
    #[arg(long, env = "CONCLAVE_DEVICE", value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Show a running cluster instead of a checkpoint: gRPC address of a router, http://host:port or host:port.
    #[arg(long, value_name = "URL", value_parser = endpoint)]
    cluster: Option<String>,
    /// Draw the cluster again every so many seconds [default where no number is given: 2].
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = interval)]
    watch: Option<Duration>,
    /// Key for a router that asks for one.
    #[arg(long, env = "CONCLAVE_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Print JSON; with --watch, one object a line.
    #[arg(long)]
    json: bool,
    /// Columns that tables are cut to.
    #[arg(long, env = "CONCLAVE_WIDTH", value_name = "N", default_value_t = print::WIDTH)]
    width: usize,
}

/// Prints what was asked for.
///
/// # Errors
/// When it cannot be had, or a checkpoint would be refused.
pub async fn run(args: InspectArgs) -> Result<()> {
    match &args.cluster {
        Some(url) => cluster::run(&args, url).await,
        None if args.watch.is_some() => bail!("--watch: needs --cluster URL, a checkpoint does not change"),
        None => checkpoint(&args).await,
    }
}

async fn checkpoint(args: &InspectArgs) -> Result<()> {
    let location = ModelArgs { model: args.model.clone() }.location()?;
    let fp8 = args.device.fp8_weights();
    let look = move || Ok(Report::new(&Survey::of(&location)?, available_memory(), fp8));
    let report = blocking("look at the checkpoint", look).await?;
    let text =
        if args.json { pretty(&report)? } else { checkpoint_text::render(&report, args.width, Style::of_stdout()) };
    print::stdout(&text)?;
    match report.problems {
        0 => Ok(()),
        1 => bail!("{} would be refused: 1 problem", report.model),
        problems => bail!("{} would be refused: {problems} problems", report.model),
    }
}

fn pretty(value: &impl Serialize) -> Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if !(0.1..=86_400.0).contains(&seconds) {
        return Err(format!("{seconds} s, expected 0.1 to 86400"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_bounded() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for (text, reason) in [("x", "no number"), ("0", "0.1 to"), ("-1", "0.1 to"), ("NaN", "0.1 to")] {
            assert!(interval(text).unwrap_err().contains(reason), "{text}");
        }
    }
}
