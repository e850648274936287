//! Colour, where it is wanted.

use std::{
    env,
    io::{self, IsTerminal},
};

/// What a piece of text is, which decides its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ink {
    /// As the terminal has it.
    #[default]
    Plain,
    /// Titles.
    Title,
    /// Less important.
    Dim,
    /// As it should be.
    Good,
    /// To be looked at.
    Warning,
    /// Wrong.
    Bad,
}

/// Whether text is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// No colour at all.
    #[cfg(test)]
    pub const PLAIN: Self = Self { colour: false };

    /// As stdout takes it: coloured on a terminal, unless `NO_COLOR` is set (no-color.org).
    pub fn of_stdout() -> Self {
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: io::stdout().is_terminal() && !unwanted }
    }

    /// The text in the colour of `ink`.
    pub fn paint(self, ink: Ink, text: &str) -> String {
        let code = match ink {
            Ink::Plain => return text.to_owned(),
            _ if !self.colour || text.is_empty() => return text.to_owned(),
            Ink::Title => "1",
            Ink::Dim => "2",
            Ink::Good => "32",
            Ink::Warning => "33",
            Ink::Bad => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_coloured_style_paints() {
        let coloured = Style { colour: true };
        assert_eq!(coloured.paint(Ink::Bad, "x"), "\x1b[31mx\x1b[0m");
        assert_eq!((coloured.paint(Ink::Plain, "x"), coloured.paint(Ink::Bad, "")), ("x".to_owned(), String::new()));
        assert_eq!(Style::PLAIN.paint(Ink::Bad, "x"), "x");
    }
}
