//! `conclave generate`: one completion over gRPC, which goes on where a broken connection left it.
//!
//! The flags become a request (`request`); what came of it so far, and what to ask for next, is kept in `progress`; the
//! session (`session`) connects, asks, and connects again; `output` shows it.

mod output;
mod progress;
mod request;
mod session;

use std::io::{self, IsTerminal, Read};

use anyhow::{Context, Result};
use clap::Args;

use super::unless_reader_gone;

use output::{Output, Printer, Terminals};
pub use request::RequestArgs;
pub use session::SessionArgs;

/// Generate one completion over gRPC; goes on where a broken connection left it.
#[derive(Debug, Args)]
#[command(after_help = "\
With --json every line of the output is an object with `event` (started, prompt, delta, finished) and `choice`; `delta` has
the text and the tokens, with logprobs where asked for.

When the connection is lost, generate connects again and goes on with the same bits as if nothing had happened; all
unfinished choices go on where each of them was.

Examples:
  conclave generate 'Once upon a time' --max-tokens 50
  conclave generate --chat 'What is the capital of France?' --temperature 0
  conclave generate --tokens 100,200,300 --json --logprobs 3
  conclave generate - --seed 7 < prompt.txt")]
pub struct GenerateArgs {
    #[command(flatten)]
    pub session: SessionArgs,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub request: RequestArgs,
}

/// Runs until the last choice has ended.
///
/// # Errors
/// When the server refuses the request, or cannot be reached any more.
pub async fn run(args: GenerateArgs) -> Result<()> {
    let request = args.request.request(stdin)?;
    let choices = request.choices.max(1);
    let printer = if args.json { Printer::json() } else { Printer::text(choices) };
    let terminals = Terminals { out: io::stdout().is_terminal(), err: io::stderr().is_terminal() };
    let mut output = Output::new(io::stdout(), printer, terminals);
    let ended = session::run(&args.session, request, &mut output).await;
    unless_reader_gone(ended.inspect_err(|_| output.begin_note()))
}

/// All of standard input without its last line end.
fn stdin() -> Result<String> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).context("read the prompt from standard input")?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}
