//! What was found, as lines and as JSON.

use std::path::Path;

use serde::Serialize;

use crate::{
    Part,
    runner::{Found, Stop},
};

/// Everything that a run found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// The device, and what its rate of operations is of.
    pub(crate) device: String,
    /// Bytes read a second, and operations.
    pub(crate) read: f64,
    pub(crate) flops: f64,
    pub(crate) rows: Vec<Row>,
    pub(crate) answers: Vec<Answer>,
}

/// One case.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    part: Part,
    name: String,
    state: State,
    /// Why it was left out or what went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    /// The median, in seconds, and all samples.
    seconds: Option<f64>,
    samples: Vec<f64>,
    bytes: f64,
    flops: f64,
    /// The shortest time for the work, by the rates of the device, in seconds.
    floor: f64,
    /// Norm of the error by that of the definition, and the most that is right.
    error: Option<f64>,
    error_limit: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Measured,
    Skipped,
    Failed,
}

/// A question of yes or no.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Answer {
    question: String,
    yes: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    failed: bool,
}

impl Stop {
    fn text(self) -> (State, String) {
        match self {
            Self::Skip(why) => (State::Skipped, why),
            Self::Failed(what) => (State::Failed, what),
        }
    }
}

impl Row {
    pub(crate) fn of(part: Part, name: &str, found: Result<Found, Stop>, report: &Report) -> Self {
        let name = name.to_owned();
        let found = match found {
            Ok(found) => found,
            Err(stop) => {
                let (state, note) = stop.text();
                let (seconds, samples) = (None, Vec::new());
                let (bytes, flops, floor, error, error_limit) = (0.0, 0.0, 0.0, None, None);
                return Self {
                    part,
                    name,
                    state,
                    note: Some(note),
                    seconds,
                    samples,
                    bytes,
                    flops,
                    floor,
                    error,
                    error_limit,
                };
            }
        };
        let work = found.work;
        let rate = if work.fp8 { 2.0 * report.flops } else { report.flops };
        let wrong = found.error.filter(|error| error.found.is_nan() || error.found > error.limit);
        Self {
            part,
            name,
            state: if wrong.is_some() { State::Failed } else { State::Measured },
            note: wrong.map(|error| format!("an error of {:.1e}, expected at most {:.0e}", error.found, error.limit)),
            seconds: Some(median(&found.samples)),
            samples: found.samples,
            bytes: work.bytes,
            flops: work.flops,
            floor: (work.bytes / report.read).max(work.flops / rate),
            error: found.error.map(|error| error.found),
            error_limit: found.error.map(|error| error.limit),
        }
    }

    /// `name, µs, GB/s, TFLOP/s, floor in µs, share of the floor, error`
    fn line(&self) -> String {
        let note = self.note.as_ref().map_or_else(String::new, |note| format!("  {note}"));
        let Some(seconds) = self.seconds else {
            let state = if self.state == State::Skipped { "SKIP" } else { "FAILED" };
            return format!("{:<46} {state}{note}", self.name);
        };
        let error = self.error.map_or_else(|| "-".to_owned(), |error| format!("{error:.1e}"));
        format!(
            "{:<46} {:>10.1} {:>8.0} {:>8.1} {:>10.1} {:>6.0} % {error:>9}{note}",
            self.name,
            seconds * 1e6,
            self.bytes / seconds / 1e9,
            self.flops / seconds / 1e12,
            self.floor * 1e6,
            self.floor / seconds * 100.0
        )
    }
}

impl Answer {
    pub(crate) fn of(question: &str, found: Result<bool, Stop>) -> Self {
        let question = question.to_owned();
        match found {
            Ok(yes) => Self { question, yes: Some(yes), note: None, failed: false },
            Err(stop) => {
                let (state, note) = stop.text();
                Self { question, yes: None, note: Some(note), failed: state == State::Failed }
            }
        }
    }
}

impl Report {
    pub(crate) fn of(device: String) -> Self {
        Self { device, read: f64::MIN_POSITIVE, flops: f64::MIN_POSITIVE, rows: Vec::new(), answers: Vec::new() }
    }

    pub(crate) fn head(&self) {
        let (read, flops) = (self.read / 1e9, self.flops / 1e12);
        println!("{}: reads {read:.0} GB/s, {flops:.1} TFLOP/s", self.device);
    }

    /// What the lines of a part mean.
    pub(crate) fn title(part: Part) {
        let [time, rate, flops, floor, share, error] = ["µs", "GB/s", "TFLOP/s", "floor µs", "of floor", "error"];
        match part {
            Part::Bits => println!("\n== {part}"),
            _ => println!(
                "\n{:<46} {time:>10} {rate:>8} {flops:>8} {floor:>10} {share:>8} {error:>9}",
                format!("== {part}")
            ),
        }
    }

    pub(crate) fn row(&mut self, row: Row) {
        println!("{}", row.line());
        self.rows.push(row);
    }

    pub(crate) fn answer(&mut self, answer: Answer) {
        let text = match (&answer.yes, &answer.note) {
            (Some(true), _) => "yes".to_owned(),
            (Some(false), _) => "no".to_owned(),
            (None, note) => {
                let state = if answer.failed { "FAILED" } else { "SKIP" };
                format!("{state}  {}", note.as_deref().unwrap_or_default())
            }
        };
        println!("{}: {text}", answer.question);
        self.answers.push(answer);
    }

    /// Cases that went wrong or gave wrong results. A no is none.
    pub(crate) fn failures(&self) -> usize {
        let rows = self.rows.iter().filter(|row| row.state == State::Failed).count();
        rows + self.answers.iter().filter(|answer| answer.failed).count()
    }

    /// Writes all of it, so that it is there whatever comes next.
    pub(crate) fn write(&self, json: Option<&Path>) {
        let Some(path) = json else { return };
        let text = serde_json::to_string_pretty(self).expect("figures and names");
        if let Err(error) = std::fs::write(path, text + "\n") {
            eprintln!("{}: {error}", path.display());
        }
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
