//! Where the time of a step goes, operation by operation.

use anyhow::{Result, bail};
use serde::Serialize;

use super::{
    limits::Rates,
    measure::{Bench, Shape},
    profiled::{Log, Recorder},
};

/// The time of one step, and of the operations in it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// What kind of step.
    pub name: String,
    /// From one token to the next, or from a request to its first token.
    pub seconds: f64,
    /// One an operation, the longest first.
    pub lines: Vec<Line>,
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Its name, and the shape `[out, in]` of its matrix.
    pub operation: String,
    /// In one step.
    pub calls: f64,
    /// To be read by all of them.
    pub bytes: f64,
    /// To be done by all of them.
    pub flops: f64,
    /// Time of all of them.
    pub seconds: f64,
    /// The shortest time that the machine allows for them.
    pub limit: f64,
}

impl Profile {
    fn new(name: String, seconds: f64, log: &Log, rates: &Rates) -> Self {
        let line = |(operation, taken): (_, &super::profiled::Taken)| Line {
            operation: ToString::to_string(operation),
            calls: taken.calls,
            bytes: taken.work.bytes,
            flops: taken.work.flops,
            seconds: taken.seconds,
            limit: rates.seconds(taken.work),
        };
        let mut lines: Vec<Line> = log.0.iter().map(line).collect();
        lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Self { name, seconds, lines }
    }

    /// Time outside of the operations: the ways to and from the experts, gate, sums, scheduling, sampling, delivery.
    pub fn rest(&self) -> f64 {
        self.seconds - self.lines.iter().map(|line| line.seconds).sum::<f64>()
    }
}

/// What to profile.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// Tokens of the prompt whose prefill is looked at; one step.
    pub chunk: usize,
    /// Context of the decode steps.
    pub context: usize,
    /// How many decode steps.
    pub tokens: usize,
}

/// Profiles the prefill of one chunk, and decode steps of one stream: what a request for many tokens took beyond one for
/// a single token.
///
/// # Errors
/// When a request fails or takes longer than a measurement may.
pub async fn run(bench: &mut Bench, recorder: &Recorder, steps: Steps, rates: &Rates) -> Result<Vec<Profile>> {
    let (seconds, log) = recorded(bench, recorder, steps.chunk, 1).await?;
    let chunk = Profile::new(format!("prefill of {} tokens", steps.chunk), seconds, &log, rates);
    let (first_seconds, first) = recorded(bench, recorder, steps.context, 1).await?;
    let (seconds, all) = recorded(bench, recorder, steps.context, 1 + steps.tokens).await?;
    let count = steps.tokens as f64;
    let name = format!("decode step of 1 stream, context {}", steps.context);
    let decode = Profile::new(name, (seconds - first_seconds) / count, &all.per_step(&first, count), rates);
    Ok(vec![chunk, decode])
}

/// The time of a request until its last token, and the operations until its end.
async fn recorded(bench: &mut Bench, recorder: &Recorder, prompt: usize, tokens: usize) -> Result<(f64, Log)> {
    recorder.start();
    let arrivals = bench.streams(Shape { streams: 1, prompt, tokens }, bench.deadline()).await;
    let log = recorder.stop();
    match arrivals?.first().and_then(|times| times.get(tokens - 1)) {
        Some(seconds) => Ok((*seconds, log)),
        None => bail!("--profile: {tokens} tokens after {prompt} were not there in time; --limit may be raised"),
    }
}
