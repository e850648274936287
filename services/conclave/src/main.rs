//! `conclave`: one binary, a subcommand per part.

// Nothing is reachable from outside of a binary.
#![allow(unreachable_pub)]

mod commands;
mod process;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serve Mixture-of-Experts models of the DeepSeek-V2 family with experts as services of their own.
#[derive(Debug, Parser)]
#[command(name = "conclave", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<process::serve::ServeArgs>),
    Router(Box<process::router::RouterArgs>),
    Attention(Box<process::attention::AttentionCommand>),
    Expert(Box<process::expert::ExpertArgs>),
    Chat(Box<commands::chat::ChatArgs>),
    Generate(Box<commands::generate::GenerateArgs>),
    Inspect(Box<commands::inspect::InspectArgs>),
    Synth(Box<commands::synth::SynthArgs>),
    Bench(Box<commands::bench::BenchArgs>),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            commands::say(format_args!("conclave: start threads: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(run(command));
    // Who is told to end while weights are loaded does not wait for them.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            commands::say(format_args!("conclave: {}", with_causes(&error)));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => process::serve::run(*args).await,
        Command::Router(args) => process::router::run(*args).await,
        Command::Attention(args) => process::attention::run(*args).await,
        Command::Expert(args) => process::expert::run(*args).await,
        Command::Chat(args) => commands::chat::run(*args).await,
        Command::Generate(args) => commands::generate::run(*args).await,
        Command::Inspect(args) => commands::inspect::run(*args).await,
        Command::Synth(args) => commands::synth::run(*args).await,
        Command::Bench(args) => commands::bench::run(*args).await,
    }
}

/// An error with its causes, each once: many messages end in their cause already.
fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |said, cause| if said.ends_with(&cause) { said } else { format!("{said}: {cause}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let cause = || std::io::Error::other("in use");
        assert_eq!(with_causes(&anyhow::Error::new(cause()).context("listen on a port")), "listen on a port: in use");
        assert_eq!(
            with_causes(&anyhow::Error::new(cause()).context("listen: in use").context("start")),
            "start: listen: in use"
        );
    }
}
