//! Streams that decode while prompts arrive: how long they wait for a token, and what the mixture costs.

use std::{ops::RangeInclusive, time::Duration};

use anyhow::Result;
use clap::Args;
use futures::future::try_join_all;
use tokio::time::{Instant, sleep_until};

use super::{
    decoding::{Tokens, during},
    measure::{Bench, Shape, arrivals},
    prompts::SplitMix,
    report::{Figure, Unit, late},
    stats::percentile,
    timing::{Mixture, mixture},
};

/// Decides lengths and times of the prompts.
const SEED: u64 = 0x0a11;

/// Streams that decode while prompts arrive.
#[derive(Debug, Clone, Args)]
pub struct MixedArgs {
    /// Measure streams that decode while prompts arrive, too.
    #[arg(long, env = "CONCLAVE_BENCH_MIXED")]
    pub mixed: bool,
    /// Streams that decode in it.
    #[arg(long, env = "CONCLAVE_BENCH_MIXED_STREAMS", value_name = "STREAMS", default_value = "32")]
    pub mixed_streams: usize,
    /// Prompts that arrive in it.
    #[arg(long, env = "CONCLAVE_BENCH_MIXED_PROMPTS", value_name = "N", default_value = "16")]
    pub mixed_prompts: usize,
    /// Shortest and longest of them, in tokens.
    #[arg(
        long,
        env = "CONCLAVE_BENCH_MIXED_LENGTHS",
        value_name = "MIN-MAX",
        value_parser = lengths,
        default_value = "128-4096"
    )]
    pub mixed_lengths: RangeInclusive<usize>,
}

/// `MIN-MAX`
fn lengths(text: &str) -> Result<RangeInclusive<usize>, String> {
    let parsed = text.split_once('-').and_then(|(min, max)| Some((min.parse().ok()?, max.parse().ok()?)));
    let valid = parsed.filter(|(min, max)| (1..=*max).contains(min));
    valid.map(|(min, max)| min..=max).ok_or_else(|| "expected MIN-MAX, both at least 1".to_owned())
}

/// What is compared with what.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Tokens of a prefill chunk: its time, alone, is what waits are measured in.
    pub chunk: usize,
    /// Prompt tokens of the streams.
    pub context: usize,
    /// Decode steps before the prompts.
    pub steps: usize,
}

/// A prompt to come.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Coming {
    tokens: usize,
    /// Seconds after the first one, as a multiple of the mean pause.
    at: f64,
}

/// Lengths evenly spread over their logarithm, pauses exponentially distributed; the same in every run.
fn schedule(count: usize, lengths: &RangeInclusive<usize>) -> Vec<Coming> {
    let mut random = SplitMix(SEED);
    let mut chance = move || f64::midpoint(f64::from(random.unit()), 1.0);
    let (min, max) = (*lengths.start() as f64, *lengths.end() as f64);
    let mut at = 0.0;
    let mut coming = || {
        let tokens = (min * (max / min).powf(chance())).round() as usize;
        let now = Coming { tokens, at };
        at -= (1.0 - chance()).ln();
        now
    };
    (0..count).map(|_| coming()).collect()
}

/// Measures the mixture.
///
/// # Errors
/// When a request fails.
pub async fn measure(bench: &mut Bench, args: &MixedArgs, sizes: Sizes) -> Result<Vec<Figure>> {
    let name = format!("mixed, {} streams and {} prompts", args.mixed_streams, args.mixed_prompts);
    bench.progress.begin(&name, bench.repeat);
    let needed = (args.mixed_lengths.end() + 1).max(sizes.chunk + 1);
    if needed > bench.context_limit {
        let why = format!("needs {needed} tokens, the context is {}", bench.context_limit);
        return Ok(vec![Figure::skipped(name, Unit::Times, why)]);
    }
    let coming = schedule(args.mixed_prompts, &args.mixed_lengths);
    let deadline = bench.deadline();
    let mut runs = Vec::new();
    while runs.len() < bench.repeat && Instant::now() < deadline {
        let Some(alone) = alone(bench, sizes.chunk, &coming, deadline).await? else { break };
        runs.extend(together(bench, args.mixed_streams, sizes, &coming, alone, deadline).await?);
        bench.settle().await?;
        bench.progress.step();
    }
    if runs.is_empty() {
        return Ok(vec![Figure::skipped(name, Unit::Times, late(bench.limit))]);
    }
    Ok(figures(&name, sizes.chunk, &runs))
}

/// Times without streams, in seconds.
#[derive(Debug, Clone, Copy)]
struct Alone {
    chunk: f64,
    prompts: f64,
}

/// A chunk, and all the prompts one after the other. `None`: not done in time.
async fn alone(bench: &mut Bench, chunk: usize, coming: &[Coming], deadline: Instant) -> Result<Option<Alone>> {
    let mut times = Vec::new();
    for prompt in std::iter::once(chunk).chain(coming.iter().map(|coming| coming.tokens)) {
        let arrivals = bench.streams(Shape { streams: 1, prompt, tokens: 1 }, deadline).await?;
        let Some(first) = arrivals[0].first() else { return Ok(None) };
        times.push(*first);
    }
    Ok(Some(Alone { chunk: times[0], prompts: times[1..].iter().sum() }))
}

/// One run of the mixture.
struct Run {
    alone: Alone,
    mixture: Mixture,
    /// Tokens of the prompts.
    prompt_tokens: usize,
    /// From each prompt to its first token, in seconds.
    first_tokens: Vec<f64>,
}

/// Streams that decode, and after some steps the prompts, as fast as they could be computed alone. `None`: not done in
/// time.
async fn together(
    bench: &mut Bench,
    streams: usize,
    sizes: Sizes,
    coming: &[Coming],
    alone: Alone,
    deadline: Instant,
) -> Result<Option<Run>> {
    let endless = bench.context_limit - sizes.context;
    let decoding = (0..streams).map(|_| bench.request(sizes.context, endless)).collect();
    let prompts: Vec<_> = coming.iter().map(|coming| bench.request(coming.tokens, 1)).collect();
    let (target, pause, start) = (bench.target.clone(), alone.prompts / coming.len() as f64, Instant::now());
    let measured = async |tokens: &mut Tokens| {
        tokens.until(|times| times.iter().all(|times| times.len() > sizes.steps)).await;
        let begin = Instant::now();
        let prompts = prompts.into_iter().zip(coming).map(async |(request, coming)| {
            let at = begin + Duration::from_secs_f64(coming.at * pause);
            sleep_until(at).await;
            arrivals(&target, request, at, deadline).await
        });
        let first_tokens: Vec<f64> = try_join_all(prompts).await?.into_iter().flatten().collect();
        let window = (begin - start).as_secs_f64()..start.elapsed().as_secs_f64();
        let past = |times: &Vec<f64>| times.last().is_some_and(|last| *last >= window.end);
        tokens.until(|times| times.iter().all(past)).await;
        Ok(mixture(&tokens.times, &window).map(|mixture| {
            let prompt_tokens = coming.iter().map(|coming| coming.tokens).sum();
            Run { alone, mixture, prompt_tokens, first_tokens }
        }))
    };
    let run = during(&bench.target, decoding, start, deadline, measured).await?.flatten();
    Ok(run.filter(|run| run.first_tokens.len() == coming.len()))
}

fn figures(name: &str, chunk: usize, runs: &[Run]) -> Vec<Figure> {
    let figure = |what: String, unit, of: &dyn Fn(&Run) -> f64| {
        Figure::new(format!("{name}: {what}"), unit, runs.iter().map(of).collect())
    };
    let gap = |what: &str, percent| {
        let of = move |run: &Run| percentile(&run.mixture.gaps, percent).unwrap_or(f64::NAN) / run.alone.chunk;
        figure(format!("gap {what}, in chunks"), Unit::Times, &of)
    };
    let tokens = |run: &Run| (run.prompt_tokens + run.mixture.tokens) as f64 / run.mixture.seconds;
    vec![
        figure(format!("chunk of {chunk} alone"), Unit::Milliseconds, &|run| run.alone.chunk * 1e3),
        gap("min", 0.0),
        gap("median", 50.0),
        gap("p99", 99.0),
        gap("max", 100.0),
        figure("prompt and output tokens".to_owned(), Unit::TokensPerSecond, &tokens),
        figure("time of both alone by time".to_owned(), Unit::Times, &Run::efficiency),
        figure("time to first token".to_owned(), Unit::Milliseconds, &|run| {
            percentile(&run.first_tokens, 50.0).unwrap_or(f64::NAN) * 1e3
        }),
    ]
}

impl Run {
    /// The time that the same tokens take when prompts and streams have the machine for themselves, one after the other,
    /// by the time that they took together.
    fn efficiency(&self) -> f64 {
        (self.alone.prompts + self.mixture.tokens as f64 / self.mixture.before) / self.mixture.seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_is_the_same_in_every_run_and_within_its_bounds() {
        let coming = schedule(200, &(128..=4096));
        assert_eq!(coming, schedule(200, &(128..=4096)));
        assert!(coming.iter().all(|coming| (128..=4096).contains(&coming.tokens)));
        let short = coming.iter().filter(|coming| coming.tokens < 724).count();
        assert!((80..120).contains(&short), "half of them are below the middle of the logarithms: {short}");
        assert!(coming.is_sorted_by(|a, b| a.at < b.at) && coming[0].at == 0.0);
        assert!((150.0..250.0).contains(&coming[199].at), "a mean pause of one: {}", coming[199].at);
        assert!(schedule(9, &(7..=7)).iter().all(|coming| coming.tokens == 7));
    }

    #[test]
    fn lengths_are_a_range() {
        assert_eq!(lengths("128-4096"), Ok(128..=4096));
        assert!([lengths("0-5"), lengths("6-5"), lengths("5"), lengths("a-b")].iter().all(Result::is_err));
    }

    #[test]
    fn efficiency_compares_with_both_alone() {
        let mixture = Mixture { before: 10.0, gaps: vec![], tokens: 20, seconds: 4.0 };
        let alone = Alone { chunk: 1.0, prompts: 3.0 };
        let run = Run { alone, mixture, prompt_tokens: 100, first_tokens: vec![] };
        assert!((run.efficiency() - 1.25).abs() < 1e-12, "3 s and 2 s in 4 s");
    }
}
