//! `conclave chat`: a terminal chat with any OpenAI-compatible endpoint.
//!
//! What is typed (`editor`) is a message or a command (`command`). A session (`session`) keeps the conversation
//! (`conversation`), asks the endpoint (`endpoint`, `wire`), puts the answer together from server-sent events (`sse`,
//! `answer`) and shows it (`screen`).

mod answer;
mod command;
mod conversation;
mod editor;
mod endpoint;
mod screen;
mod session;
mod sse;
mod wire;

use std::{
    env,
    io::{self, IsTerminal},
    path::PathBuf,
};

use anyhow::{Context, Result};
use clap::Args;

use self::{
    editor::{Editor, Typed, history_file},
    endpoint::{Endpoint, base_url},
    screen::{Screen, Style},
    session::{Flow, Session, Settings},
};
use super::{RetryArgs, SamplingArgs, unless_reader_gone};

/// Chat in the terminal with any OpenAI-compatible endpoint.
#[derive(Debug, Args)]
#[command(after_help = "\
/help lists the commands of the chat. Ctrl-C stops an answer; at the empty prompt it ends the chat, as Ctrl-D does. A line
that ends in \\ goes on in the next one.

Where standard input is no terminal, each of its lines is a message, and the answers are all that is printed. NO_COLOR is
respected.

An answer whose connection is lost goes on with the same bits where the server is Conclave.

Examples:
  conclave chat
  conclave chat --url http://10.0.0.4:8000/v1 --system 'Answer briefly.' --temperature 0.3
  conclave chat --once 'What is the capital of France?'
  conclave chat < questions.txt")]
pub struct ChatArgs {
    /// The API's base; only plain http is spoken.
    #[arg(long, env = "CONCLAVE_URL", value_name = "URL", default_value = "http://127.0.0.1:8000/v1", value_parser = base_url)]
    pub url: String,
    /// Model to ask for [default: the first that the server lists].
    #[arg(long, env = "CONCLAVE_MODEL_NAME", value_name = "NAME")]
    pub model: Option<String>,
    /// API key, where the server asks for one [default: OPENAI_API_KEY of the environment].
    #[arg(long, env = "CONCLAVE_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// System message.
    #[arg(long, env = "CONCLAVE_SYSTEM", value_name = "TEXT")]
    pub system: Option<String>,
    /// One message: prints its answer and ends.
    #[arg(long, value_name = "TEXT")]
    pub once: Option<String>,
    /// File of what was typed before [default: conclave/chat_history in the XDG state folder].
    #[arg(long, env = "CONCLAVE_HISTORY", value_name = "FILE")]
    pub history: Option<PathBuf>,
    #[command(flatten)]
    pub retry: RetryArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Tokens of an answer at most [default: the server's].
    #[arg(long, env = "CONCLAVE_MAX_TOKENS", value_name = "N", help_heading = "Sampling")]
    pub max_tokens: Option<u32>,
    /// Text at which an answer ends; may be given several times.
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
}

/// Chats until the end of the input.
///
/// # Errors
/// When nobody answers at first; with `--once` or a script also when an answer fails.
pub async fn run(args: ChatArgs) -> Result<()> {
    unless_reader_gone(chat(args).await)
}

async fn chat(args: ChatArgs) -> Result<()> {
    let (stdin, stdout) = (io::stdin().is_terminal(), io::stdout().is_terminal());
    let person = stdin && stdout && args.once.is_none();
    let style = if person || (stdout && args.once.is_some()) { terminal_style() } else { Style::Plain };
    let key = args.api_key.or_else(|| env::var("OPENAI_API_KEY").ok()).filter(|key| !key.is_empty());
    let endpoint = Endpoint::new(args.url, key.as_deref())?;
    let settings = Settings {
        model: args.model,
        sampling: args.sampling,
        max_tokens: args.max_tokens,
        stop: args.stop,
        retries: args.retry.retries,
    };
    let mut session = Session::start(endpoint, settings, args.system, Screen::new(style)).await?;
    match args.once {
        Some(question) => session.once(question).await,
        None if person => with_person(session, args.history.or_else(default_history)).await,
        None => with_script(session).await,
    }
}

async fn with_person(mut session: Session, history: Option<PathBuf>) -> Result<()> {
    let (mut editor, trouble) = Editor::new(history)?;
    let greeting = [session.greeting()].into_iter().chain(trouble);
    greeting.into_iter().try_for_each(|line| session.screen().aside(&line))?;
    loop {
        session.screen().gap()?;
        let prompt = session.screen().prompt();
        // The editor blocks: it may not hold up a thread of the runtime.
        let reading = tokio::task::spawn_blocking(move || {
            let typed = editor.read(&prompt);
            (editor, typed)
        });
        let (back, typed) = reading.await.context("line editor")?;
        editor = back;
        match typed? {
            Typed::Text(typed) if session.live(&typed).await? == Flow::GoOn => {}
            Typed::Discarded => {}
            Typed::Text(_) | Typed::End => return Ok(()),
        }
    }
}

async fn with_script(mut session: Session) -> Result<()> {
    while let Some(line) = next_line().await? {
        if session.scripted(&line).await? == Flow::End {
            break;
        }
    }
    Ok(())
}

/// The next line of standard input. Nothing is read ahead: whoever writes it may wait for the answer first.
async fn next_line() -> Result<Option<String>> {
    let reading = tokio::task::spawn_blocking(|| io::stdin().lines().next().transpose());
    reading.await?.context("read standard input")
}

fn terminal_style() -> Style {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    Style::Terminal { colour: set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb") }
}

fn default_history() -> Option<PathBuf> {
    history_file(env::var_os("XDG_STATE_HOME").as_deref(), env::var_os("HOME").as_deref())
}
