//! Where a person types: line editing, several lines, completion of commands, and a history that outlives the chat.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustyline::{
    Config, Context, Helper,
    completion::Completer,
    error::ReadlineError,
    highlight::Highlighter,
    hint::Hinter,
    history::FileHistory,
    validate::{ValidationContext, ValidationResult, Validator},
};

use super::command::{COMMANDS, goes_on, join_lines};

/// Messages that the history keeps.
const KEPT: usize = 1000;

/// What came of a prompt.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// A message or a command.
    Text(String),
    /// Ctrl-C while something was typed: it is thrown away.
    Discarded,
    /// Ctrl-C or Ctrl-D at the empty prompt.
    End,
}

/// The line editor with its history.
pub struct Editor {
    line: rustyline::Editor<Typing, FileHistory>,
    /// `None`: it is not kept.
    history: Option<PathBuf>,
}

impl Editor {
    /// An editor that keeps its history in a file, if one is given; and why it does not, if it cannot.
    ///
    /// # Errors
    /// When the terminal cannot be used.
    pub fn new(history: Option<PathBuf>) -> Result<(Self, Option<String>)> {
        let config = Config::builder().max_history_size(KEPT).context("line editor")?.build();
        let mut line = rustyline::Editor::with_config(config).context("line editor")?;
        line.set_helper(Some(Typing::default()));
        let loaded = history.as_ref().map_or(Ok(()), |file| load(&mut line, file));
        let trouble = loaded.err().map(|error| format!("the history is not kept: {error}"));
        let history = history.filter(|_| trouble.is_none());
        Ok((Self { line, history }, trouble))
    }

    /// Reads what is typed next. Blocks.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn read(&mut self, prompt: &(String, String)) -> Result<Typed> {
        match self.line.readline(prompt) {
            Ok(typed) => {
                let typed = join_lines(&typed);
                self.remember(&typed);
                Ok(Typed::Text(typed))
            }
            Err(ReadlineError::Interrupted) if self.line.helper().is_some_and(|typing| !typing.empty.get()) => {
                Ok(Typed::Discarded)
            }
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => Ok(Typed::End),
            Err(error) => Err(error).context("read from the terminal"),
        }
    }

    /// Keeps what was typed. The history is a comfort: a chat goes on without it.
    fn remember(&mut self, typed: &str) {
        if typed.trim().is_empty() {
            return;
        }
        let added = self.line.add_history_entry(typed).is_ok_and(|added| added);
        if let Some(file) = self.history.as_ref().filter(|_| added)
            && self.line.append_history(file).is_err()
        {
            self.history = None;
        }
    }
}

/// Reads the history, or makes the folder of the one to come.
fn load(line: &mut rustyline::Editor<Typing, FileHistory>, file: &Path) -> Result<(), String> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    match line.load_history(file) {
        Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        loaded => loaded.map_err(|error| format!("{}: {error}", file.display())),
    }
}

/// Where the history is kept: in the XDG state folder, which is absolute and by default `~/.local/state`.
pub fn history_file(state: Option<&OsStr>, home: Option<&OsStr>) -> Option<PathBuf> {
    let absolute = |path: &OsStr| Some(PathBuf::from(path)).filter(|path| path.is_absolute());
    let folder = state.and_then(absolute).or_else(|| Some(home.and_then(absolute)?.join(".local/state")));
    folder.map(|folder| folder.join("conclave/chat_history"))
}

/// How the editor treats what is being typed.
struct Typing {
    /// Whether nothing stands there.
    empty: Cell<bool>,
}

impl Default for Typing {
    fn default() -> Self {
        Self { empty: Cell::new(true) }
    }
}

impl Helper for Typing {}
impl Highlighter for Typing {}

impl Hinter for Typing {
    type Hint = String;

    /// Hints at nothing, but hears of every change.
    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.empty.set(line.is_empty());
        None
    }
}

impl Validator for Typing {
    fn validate(&self, typed: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if goes_on(typed.input()) { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Completer for Typing {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((0, completions(&line[..at])))
    }
}

/// The commands that begin so, ready for their arguments.
fn completions(typed: &str) -> Vec<String> {
    if !typed.starts_with('/') {
        return Vec::new();
    }
    let commands = COMMANDS.iter().filter(|(name, ..)| name.starts_with(typed));
    commands
        .map(|(name, argument, _)| if argument.is_empty() { (*name).to_owned() } else { format!("{name} ") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_is_kept_in_the_state_folder() {
        let file = |state: &str, home: &str| {
            history_file(Some(OsStr::new(state)), Some(OsStr::new(home))).map(|file| file.display().to_string())
        };
        assert_eq!(file("/state", "/home/a").as_deref(), Some("/state/conclave/chat_history"));
        assert_eq!(file("", "/home/a").as_deref(), Some("/home/a/.local/state/conclave/chat_history"));
        assert_eq!(file("relative", "/home/a").as_deref(), Some("/home/a/.local/state/conclave/chat_history"));
        assert_eq!(file("", ""), None);
    }

    #[test]
    fn commands_are_completed() {
        assert_eq!(completions("/s"), ["/system ", "/save ", "/seed "]);
        assert_eq!(completions("/he"), ["/help"]);
        assert!(completions("he").is_empty() && completions("/x").is_empty());
    }

    #[test]
    fn a_history_that_cannot_be_kept_does_no_harm() {
        let (_, trouble) = Editor::new(Some("/proc/none/chat_history".into())).expect("an editor");
        assert!(trouble.is_some_and(|trouble| trouble.starts_with("the history is not kept: /proc/none: ")));
    }
}
