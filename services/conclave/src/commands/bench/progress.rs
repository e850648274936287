//! What a run is doing, on stderr.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// Shows the measurement under way: a bar on a terminal, a line each elsewhere. Drawn between samples only.
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// Nothing yet.
    pub fn new() -> Self {
        let bar = ProgressBar::new(1);
        if let Ok(style) = ProgressStyle::with_template("{elapsed:>4} {bar:20} {msg}") {
            bar.set_style(style);
        }
        Self { bar, lines: !std::io::stderr().is_terminal() }
    }

    /// Something begins, of so many steps.
    pub fn begin(&self, what: &str, steps: usize) {
        self.bar.reset();
        self.bar.set_length(steps.max(1) as u64);
        self.bar.set_message(what.to_owned());
        if self.lines {
            eprintln!("{what}");
        }
    }

    /// A step is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// Clears the bar.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
