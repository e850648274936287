//! Where the time of a step goes, operation by operation.

use anyhow::{Result, bail};
use serde::Serialize;

use super::{
    limits::Rates,
    measure::{Bench, Shape, counted},
    recorder::{Recorder, Step},
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
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Tokens of the prompt whose prefill is looked at; one step.
    pub chunk: usize,
    /// Numbers of streams whose decode steps are looked at.
    pub streams: Vec<usize>,
    /// Context of the decode steps.
    pub context: usize,
    /// How many decode steps.
    pub tokens: usize,
}

/// The prefill of one chunk and a decode step of some numbers of streams, each the one of median duration among several.
///
/// # Errors
/// When a request fails or takes longer than a measurement may.
pub async fn run(bench: &mut Bench, recorder: &Recorder, wanted: &Wanted) -> Result<Vec<Profile>> {
    let prompt = Shape { streams: 1, prompt: wanted.chunk, tokens: 1 };
    let mut chunks = Vec::new();
    let before = bench.probe.rates().await?;
    for _ in 0..bench.repeat {
        recorder.start();
        let arrivals = bench.whole(prompt, bench.deadline()).await;
        let steps = recorder.stop();
        chunks.extend(arrivals?.map_or_else(Vec::new, |_| steps));
    }
    let mut now = bench.probe.rates().await?;
    let mut profiles = vec![of(&format!("prefill of {} tokens", wanted.chunk), chunks, before.between(now))?];
    for streams in &wanted.streams {
        let shape = Shape { streams: *streams, prompt: wanted.context, tokens: wanted.tokens };
        recorder.start();
        let arrivals = bench.decoding(shape, bench.deadline()).await;
        let mut steps = recorder.stop();
        arrivals?;
        steps.retain(|step| step.rows == *streams);
        bench.settle().await?;
        let before = std::mem::replace(&mut now, bench.probe.rates().await?);
        let name = format!("decode step of {}, context {}", counted(*streams), wanted.context);
        profiles.push(of(&name, steps, before.between(now))?);
    }
    Ok(profiles)
}

/// The step of median duration.
fn of(name: &str, mut steps: Vec<Step>, rates: Rates) -> Result<Profile> {
    steps.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    match steps.get(steps.len() / 2) {
        Some(step) => Ok(Profile::new(name, step, rates)),
        None => bail!("--profile: {name}: not done in time; --limit may be raised"),
    }
}
