//! Slash commands.

use std::path::PathBuf;

use crate::commands::sampling::number;

/// What was typed.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Nothing.
    Empty,
    /// Something for the model.
    Message(String),
    /// The last question again.
    Retry,
    /// The end.
    Exit,
    /// Something else for the chat.
    Command(Command),
}

/// A command of the chat.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Help,
    Clear,
    System(Option<String>),
    Undo,
    Save(PathBuf),
    Seed(Option<u64>),
    Temperature(Option<f32>),
}

/// Name, argument and meaning of every command.
pub const COMMANDS: [(&str, &str, &str); 9] = [
    ("/help", "", "this list"),
    ("/clear", "", "begin a new conversation"),
    ("/system", "TEXT", "set the system message; without TEXT: none"),
    ("/retry", "", "ask the last question again"),
    ("/undo", "", "forget the last question and its answer"),
    ("/save", "FILE", "write the conversation as JSON messages"),
    ("/seed", "N", "draw with this seed; without N: a new one each time"),
    ("/temperature", "X", "vary the answers more or less; without X: as the server does"),
    ("/exit", "", "end, as Ctrl-D"),
];

/// Reads what was typed.
///
/// # Errors
/// When a command is unknown or its argument is wrong.
pub fn parse(typed: &str) -> Result<Input, String> {
    let text = typed.trim();
    if text.is_empty() {
        return Ok(Input::Empty);
    }
    // A blank in front makes a message of what would be a command.
    if !typed.starts_with('/') {
        return Ok(Input::Message(text.to_owned()));
    }
    let (name, argument) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let argument = Some(argument.trim()).filter(|argument| !argument.is_empty());
    command(name, argument)
}

fn command(name: &str, argument: Option<&str>) -> Result<Input, String> {
    let plain = |input: Input| match argument {
        None => Ok(input),
        Some(found) => Err(format!("{name}: found {found:?}, expected nothing after it")),
    };
    match name {
        "/help" | "/?" => plain(Input::Command(Command::Help)),
        "/clear" => plain(Input::Command(Command::Clear)),
        "/retry" => plain(Input::Retry),
        "/undo" => plain(Input::Command(Command::Undo)),
        "/exit" | "/quit" => plain(Input::Exit),
        "/system" => Ok(Input::Command(Command::System(argument.map(str::to_owned)))),
        "/save" => match argument {
            Some(file) => Ok(Input::Command(Command::Save(file.into()))),
            None => Err("/save: found nothing, expected a file name".to_owned()),
        },
        "/seed" => {
            let seed = |text: &str| text.parse().map_err(|_| format!("/seed: found {text:?}, expected a whole number"));
            argument.map(seed).transpose().map(Command::Seed).map(Input::Command)
        }
        "/temperature" => {
            let temperature = |text| number(text).map_err(|wrong| format!("/temperature: {wrong}"));
            argument.map(temperature).transpose().map(Command::Temperature).map(Input::Command)
        }
        _ => Err(format!(
            "there is no command {name}; /help lists them, and a blank before the slash makes it a message"
        )),
    }
}

/// The list of commands, a line each.
pub fn help() -> String {
    let line = |(name, argument, meaning): (&str, &str, &str)| {
        let call = format!("{name} {argument}");
        format!("{call:<16} {meaning}\n")
    };
    let keys = "A line that ends in \\ goes on. Ctrl-C stops an answer; at the empty prompt it ends, as Ctrl-D does.";
    COMMANDS.into_iter().map(line).chain([keys.to_owned()]).collect()
}

/// What was typed over several lines, each but the last ending in a backslash.
pub fn join_lines(typed: &str) -> String {
    typed.replace("\\\n", "\n")
}

/// Whether another line follows.
pub fn goes_on(typed: &str) -> bool {
    typed.ends_with('\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_commands_are_told_apart() {
        let message = |text: &str| Ok(Input::Message(text.to_owned()));
        assert_eq!(parse("  \n"), Ok(Input::Empty));
        assert_eq!(parse("hello /help\n"), message("hello /help"));
        assert_eq!(parse(" /etc is a folder"), message("/etc is a folder"));
        for (typed, command) in [
            ("/help", Command::Help),
            ("/clear ", Command::Clear),
            ("/system  be brief\nand kind ", Command::System(Some("be brief\nand kind".to_owned()))),
            ("/system", Command::System(None)),
            ("/undo", Command::Undo),
            ("/save a b.json", Command::Save("a b.json".into())),
            ("/seed 7", Command::Seed(Some(7))),
            ("/seed", Command::Seed(None)),
            ("/temperature 0.5", Command::Temperature(Some(0.5))),
        ] {
            assert_eq!(parse(typed), Ok(Input::Command(command)), "{typed}");
        }
        assert_eq!(
            (parse("/retry"), parse("/exit"), parse("/quit")),
            (Ok(Input::Retry), Ok(Input::Exit), Ok(Input::Exit))
        );
    }

    #[test]
    fn wrong_commands_say_why() {
        for (typed, reason) in [
            ("/sytem x", "there is no command /sytem"),
            ("/", "there is no command /"),
            ("/save", "expected a file name"),
            ("/seed x", "found \"x\", expected a whole number"),
            ("/temperature hot", "expected a finite number"),
            ("/clear all", "found \"all\", expected nothing after it"),
        ] {
            let error = parse(typed).expect_err("refused");
            assert!(error.contains(reason), "{typed}: {error}");
        }
    }

    #[test]
    fn every_command_of_the_list_is_one() {
        for (name, argument, _) in COMMANDS {
            let argument = if argument.is_empty() { "" } else { "1" };
            let parsed = parse(&format!("{name} {argument}"));
            assert!(matches!(parsed, Ok(Input::Command(_) | Input::Retry | Input::Exit)), "{name}: {parsed:?}");
            assert!(help().contains(name));
        }
    }

    #[test]
    fn lines_are_joined() {
        assert!(goes_on("a\\") && !goes_on("a"));
        assert_eq!(join_lines("a\\\nb \\\nc\\d"), "a\nb \nc\\d");
    }
}
