//! How far the writing is: a bar on a terminal, a line now and then elsewhere.

use std::{
    io::{self, IsTerminal},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::{
    print::units::{bytes, percent},
    say,
};

/// Between two lines.
const PERIOD: Duration = Duration::from_secs(5);

/// Shows progress on stderr.
pub enum Progress {
    /// Drawn again and again.
    Bar(ProgressBar),
    /// Written from time to time.
    Lines(Mutex<Pace>),
}

impl Progress {
    /// Begins to show the progress of `total` bytes.
    pub fn start(total: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self::Lines(Mutex::new(Pace::new(total, Instant::now())));
        }
        let template = "{wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
        let bar = ProgressBar::new(total);
        // The template is a constant that parses; the default look would do as well.
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self::Bar(bar)
    }

    /// `done` bytes are written, or already more.
    pub fn advance(&self, done: u64) {
        match self {
            Self::Bar(bar) => bar.set_position(bar.position().max(done)),
            Self::Lines(pace) => {
                let mut pace = pace.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(line) = pace.line(done, Instant::now()) {
                    say(line);
                }
            }
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// When the next line is due. Pure: the time goes in.
pub struct Pace {
    total: u64,
    begin: Instant,
    due: Instant,
}

impl Pace {
    fn new(total: u64, begin: Instant) -> Self {
        Self { total, begin, due: begin + PERIOD }
    }

    /// The line to write at `now`, where one is due.
    fn line(&mut self, done: u64, now: Instant) -> Option<String> {
        if now < self.due {
            return None;
        }
        self.due = now + PERIOD;
        let rate = done as f64 / 1e9 / (now - self.begin).as_secs_f64().max(1e-3);
        let (share, done, total) = (percent(done, self.total), bytes(done), bytes(self.total));
        Some(format!("{share}: {done} of {total} written, {rate:.2} GB/s"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_every_few_seconds() {
        let begin = Instant::now();
        let mut pace = Pace::new(40_000_000_000, begin);
        assert_eq!(pace.line(1, begin + Duration::from_secs(4)), None);
        let line = pace.line(10_000_000_000, begin + Duration::from_secs(5)).unwrap();
        assert_eq!(line, "25.0 %: 10.0 GB of 40.0 GB written, 2.00 GB/s");
        assert_eq!(pace.line(11, begin + Duration::from_secs(6)), None);
        assert!(pace.line(11, begin + Duration::from_secs(10)).is_some());
    }
}
