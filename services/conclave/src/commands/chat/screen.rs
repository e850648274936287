//! What people see: the answer, and dim lines around it.

use std::io::{self, Stdout, Write};

use crate::commands::say;

const DIM: &str = "\x1b[2m";
const RED: &str = "\x1b[31m";
const BOLD: &str = "\x1b[1m";
const RESET: &str = "\x1b[0m";

/// How things are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Answers alone, as they are, on standard output; the rest on standard error.
    Plain,
    /// For a person, in colour where wanted.
    Terminal { colour: bool },
}

/// Where things are shown.
pub struct Screen<W = Stdout> {
    out: W,
    style: Style,
    /// Whether the next character stands at the beginning of a line.
    at_line_start: bool,
    /// Whether nothing of an answer has been shown yet.
    at_answer_start: bool,
}

impl Screen {
    /// Standard output.
    pub fn new(style: Style) -> Self {
        Self { out: io::stdout(), style, at_line_start: true, at_answer_start: true }
    }
}

impl<W: Write> Screen<W> {
    /// Shows a part of an answer. For a person, an answer begins with its first visible character.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn text(&mut self, text: &str) -> io::Result<()> {
        let text = match self.style {
            Style::Plain => text.to_owned(),
            Style::Terminal { .. } if self.at_answer_start => printable(text.trim_start()),
            Style::Terminal { .. } => printable(text),
        };
        let Some(last) = text.chars().next_back() else { return Ok(()) };
        (self.at_line_start, self.at_answer_start) = (last == '\n', false);
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// The answer has ended: what follows begins on a new line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn end_answer(&mut self) -> io::Result<()> {
        self.at_answer_start = true;
        self.end_line()
    }

    /// Begins a new line, if one has begun.
    ///
    /// # Errors
    /// When it cannot be written.
    fn end_line(&mut self) -> io::Result<()> {
        if !std::mem::replace(&mut self.at_line_start, true) {
            self.out.write_all(b"\n")?;
        }
        self.out.flush()
    }

    /// A figure or a hint that a person may want to know.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn aside(&mut self, text: &str) -> io::Result<()> {
        match self.style {
            Style::Plain => Ok(()),
            Style::Terminal { .. } => self.line(DIM, text),
        }
    }

    /// Something that everybody should know.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn notice(&mut self, text: &str) -> io::Result<()> {
        match self.style {
            Style::Plain => {
                say(format_args!("conclave: {text}"));
                Ok(())
            }
            Style::Terminal { .. } => self.line(DIM, text),
        }
    }

    /// What went wrong.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn error(&mut self, text: &str) -> io::Result<()> {
        self.line(RED, text)
    }

    /// An empty line between turns.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn gap(&mut self) -> io::Result<()> {
        self.end_line()?;
        if self.style != Style::Plain {
            self.out.write_all(b"\n")?;
        }
        self.out.flush()
    }

    /// The prompt, plain and in colour: both as wide.
    pub fn prompt(&self) -> (String, String) {
        const PROMPT: &str = "> ";
        let coloured = self.style == Style::Terminal { colour: true };
        (PROMPT.to_owned(), if coloured { format!("{BOLD}{PROMPT}{RESET}") } else { PROMPT.to_owned() })
    }

    /// Lines of their own, each in a colour.
    fn line(&mut self, colour: &str, text: &str) -> io::Result<()> {
        self.end_line()?;
        let (on, off) = if self.style == (Style::Terminal { colour: true }) { (colour, RESET) } else { ("", "") };
        for line in text.lines() {
            writeln!(self.out, "{on}{}{off}", printable(line))?;
        }
        self.out.flush()
    }
}

/// Text that cannot steer the terminal: of control characters only line ends and tabs are left.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(style: Style) -> Screen<Vec<u8>> {
        Screen { out: Vec::new(), style, at_line_start: true, at_answer_start: true }
    }

    fn shown(style: Style) -> String {
        let mut screen = screen(style);
        screen.text(" \n").and_then(|()| screen.text("a\x1b[2Jb \r")).expect("a vector takes all");
        screen.text("").and_then(|()| screen.end_answer()).expect("a vector takes all");
        screen.aside("9 tokens").and_then(|()| screen.gap()).expect("a vector takes all");
        screen.text(" c\n").and_then(|()| screen.end_answer()).expect("a vector takes all");
        String::from_utf8(screen.out).expect("text")
    }

    #[test]
    fn plain_is_the_answer_and_nothing_else() {
        assert_eq!(shown(Style::Plain), " \na\x1b[2Jb \r\n c\n");
    }

    #[test]
    fn a_terminal_is_not_steered_by_an_answer() {
        assert_eq!(shown(Style::Terminal { colour: false }), "a[2Jb \n9 tokens\n\nc\n");
        assert_eq!(shown(Style::Terminal { colour: true }), "a[2Jb \n\x1b[2m9 tokens\x1b[0m\n\nc\n");
    }

    #[test]
    fn every_line_has_its_colour() {
        let mut screen = screen(Style::Terminal { colour: true });
        screen.error("a\nb").expect("a vector takes all");
        assert_eq!(screen.out, b"\x1b[31ma\x1b[0m\n\x1b[31mb\x1b[0m\n");
    }
}
