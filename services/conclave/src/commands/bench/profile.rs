//! Where the time of a step goes, operation by operation.

use anyhow::{Result, bail};
use serde::Serialize;

use super::{
    limits::Rates,
    measure::{Bench, Shape},
    profiled::{Recorder, Step},
};

/// The time of one step, and of the operations in it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// What kind of step.
    pub name: String,
    /// From its beginning to the next one's.
    pub seconds: f64,
    /// One an operation, the longest first.
    pub lines: Vec<Line>,
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Its name, and the shape `[out, in]` of its matrix.
    pub operation: String,
    /// How many.
    pub calls: u64,
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
    /// Of a step on a machine with these rates.
    pub fn new(name: &str, step: &Step, rates: Rates) -> Self {
        let operations = step.operations.iter();
        let mut lines: Vec<Line> = operations
            .map(|(operation, taken)| Line {
                operation: operation.to_string(),
                calls: taken.calls,
                bytes: taken.work.bytes,
                flops: taken.work.flops,
                seconds: taken.seconds,
                limit: rates.seconds(taken.work),
            })
            .collect();
        lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Self { name: name.to_owned(), seconds: step.seconds, lines }
    }

    /// Time outside of the operations: the ways to and from the experts, gate, sums, scheduling, sampling, delivery.
    pub fn rest(&self) -> f64 {
        self.seconds - self.lines.iter().map(|line| line.seconds).sum::<f64>()
    }
}

/// What to look at.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Tokens of the prompt whose prefill is looked at; one step.
    pub chunk: usize,
    /// Context of the decode steps.
    pub context: usize,
    /// How many decode steps.
    pub tokens: usize,
}

/// The prefill of one chunk and a decode step of one stream, each the one of median duration among several.
///
/// # Errors
/// When a request fails or takes longer than a measurement may.
pub async fn run(bench: &mut Bench, recorder: &Recorder, wanted: Wanted) -> Result<[Profile; 2]> {
    let Wanted { chunk, context, tokens } = wanted;
    let mut chunks = Vec::new();
    let before = bench.probe.rates().await?;
    for _ in 0..bench.repeat {
        chunks.extend(steps(bench, recorder, Shape { streams: 1, prompt: chunk, tokens: 1 }).await?);
    }
    let between = bench.probe.rates().await?;
    // One more step than is looked at: the end of the last one is not seen.
    let decode = steps(bench, recorder, Shape { streams: 1, prompt: context, tokens: 2 + tokens }).await?;
    let decode = decode.into_iter().skip_while(|step| step.rows != 1).take(tokens).collect();
    let after = bench.probe.rates().await?;
    match (median(chunks), median(decode)) {
        (Some(chunk_step), Some(decode_step)) => {
            let names = [format!("prefill of {chunk} tokens"), format!("decode step of 1 stream, context {context}")];
            Ok([
                Profile::new(&names[0], &chunk_step, before.between(between)),
                Profile::new(&names[1], &decode_step, between.between(after)),
            ])
        }
        _ => bail!("--profile: not done in time; --limit may be raised"),
    }
}

/// The steps of a request; none when it was not done in time.
async fn steps(bench: &mut Bench, recorder: &Recorder, shape: Shape) -> Result<Vec<Step>> {
    recorder.start();
    let arrivals = bench.streams(shape, bench.deadline()).await;
    let steps = recorder.stop();
    let done = arrivals?.iter().all(|times| times.len() == shape.tokens);
    Ok(if done { steps } else { Vec::new() })
}

/// The step of median duration.
fn median(mut steps: Vec<Step>) -> Option<Step> {
    steps.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let middle = steps.len() / 2;
    steps.into_iter().nth(middle)
}
