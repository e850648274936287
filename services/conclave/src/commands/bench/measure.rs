//! Requests, the times at which their tokens arrive, and the figures that follow.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use conclave_proto::v1::{GenerateRequest, SamplingOptions, generate_event::Event};
use futures::{StreamExt, future::try_join_all};
use tokio::time::{Instant, timeout_at};

use super::{
    decoding::{Tokens, during},
    limits::{Costs, Rates, Work},
    machine::Probe,
    progress::Progress,
    prompts::Prompts,
    report::{AtLeast, Figure, Unit, late},
    stats::percentile,
    target::{self, Target},
    timing::{Arrivals, steady, together},
};

/// Longest step of a target, generously.
const SETTLE: Duration = Duration::from_secs(300);

/// Sends requests to a target.
pub struct Bench {
    /// Answers them.
    pub target: Target,
    /// Their prompts.
    pub prompts: Prompts,
    /// What the model costs; `None` where it is not known.
    pub costs: Option<Costs>,
    /// Longest context of the target in tokens.
    pub context_limit: usize,
    /// Repetitions of a measurement.
    pub repeat: usize,
    /// Longest time of a measurement.
    pub limit: Duration,
    /// Told what is going on.
    pub progress: Progress,
    /// Measures the machine.
    pub probe: Probe,
}

/// One repetition.
struct Run {
    arrivals: Arrivals,
    /// What the machine gave before and after.
    rates: Rates,
}

/// Requests that run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many.
    pub streams: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens that each draws.
    pub tokens: usize,
}

impl Bench {
    /// When a measurement that begins now has to be over.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.limit
    }

    /// Runs requests once, so that buffers are made and clocks are up.
    ///
    /// # Errors
    /// When a request fails.
    pub async fn warm_up(&mut self, shapes: &[Shape]) -> Result<()> {
        self.progress.begin("warm-up", shapes.len());
        for shape in shapes {
            if self.fits(shape).is_ok() {
                self.streams(*shape, self.deadline()).await?;
            }
            self.progress.step();
        }
        Ok(())
    }

    /// Prefill of one prompt: tokens a second, and the time to the first token.
    ///
    /// # Errors
    /// When a request fails.
    pub async fn prefill(&mut self, prompt: usize) -> Result<Vec<Figure>> {
        let names = [format!("prefill {prompt}"), format!("time to first token, {prompt}")];
        let shape = Shape { streams: 1, prompt, tokens: 1 };
        let units = [Unit::TokensPerSecond, Unit::Milliseconds];
        let runs = match self.repeated(&names[0], shape, Self::whole).await? {
            Ok(runs) => runs,
            Err(why) => return Ok(skipped(&names, units, &why)),
        };
        let runs: Vec<(f64, Rates)> =
            runs.iter().filter_map(|run| Some((*run.arrivals.first()?.first()?, run.rates))).collect();
        let rates = runs.iter().map(|(seconds, _)| prompt as f64 / seconds).collect();
        let times = runs.iter().map(|(seconds, _)| seconds * 1e3).collect();
        let [rate, time] = names;
        let mut figures = vec![Figure::new(rate, units[0], rates), Figure::new(time, units[1], times)];
        let rates = runs.iter().map(|(_, rates)| *rates);
        self.set_limits(&mut figures, rates, prompt as f64, |costs| costs.prefill(prompt));
        Ok(figures)
    }

    /// Decode of several streams, after their prefill: tokens a second of all together, and the time from one token of a
    /// stream to the next.
    ///
    /// # Errors
    /// When a request fails.
    pub async fn decode(&mut self, streams: usize, context: usize, tokens: usize) -> Result<Vec<Figure>> {
        let name = format!("decode {}, context {context}", counted(streams));
        let names = [name.clone(), format!("{name}: token p50"), format!("{name}: token p99")];
        let units = [Unit::TokensPerSecond, Unit::Milliseconds, Unit::Milliseconds];
        let shape = Shape { streams, prompt: context, tokens };
        let runs = match self.repeated(&name, shape, Self::decoding).await? {
            Ok(runs) => runs,
            Err(why) => return Ok(skipped(&names, units, &why)),
        };
        let runs: Vec<_> = runs.iter().filter_map(|run| Some((steady(&run.arrivals)?, run.rates))).collect();
        let Some(middle) = runs.last().map(|(run, _)| run.middle) else {
            return Ok(skipped(&names, units, "the streams did not decode at the same time"));
        };
        let gap = |percent| runs.iter().filter_map(|(run, _)| Some(percentile(&run.gaps, percent)? * 1e3)).collect();
        let samples: [Vec<f64>; 3] = [runs.iter().map(|(run, _)| run.rate).collect(), gap(50.0), gap(99.0)];
        let figures = names.into_iter().zip(units).zip(samples);
        let mut figures: Vec<Figure> =
            figures.map(|((name, unit), samples)| Figure::new(name, unit, samples)).collect();
        let rates = runs.iter().map(|(_, rates)| *rates);
        self.set_limits(&mut figures, rates, streams as f64, |costs| {
            costs.decode_step(streams, context as f64 + middle)
        });
        Ok(figures)
    }

    fn set_limits(
        &self,
        figures: &mut [Figure],
        rates: impl Iterator<Item = Rates> + Clone,
        tokens: f64,
        work: impl FnOnce(&Costs) -> Work,
    ) {
        let at_least = self.costs.as_ref().map(|costs| AtLeast { work: work(costs), tokens });
        for figure in figures {
            figure.at_least = at_least;
            figure.limit_by(rates.clone());
        }
    }

    /// Measures the same shape again and again until it is enough or the time is over, and the machine before and after;
    /// what was cut is left out. Says why where nothing is left.
    async fn repeated(
        &mut self,
        name: &str,
        shape: Shape,
        once: impl AsyncFn(&mut Self, Shape, Instant) -> Result<Option<Arrivals>>,
    ) -> Result<Result<Vec<Run>, String>> {
        self.progress.begin(name, self.repeat);
        if let Err(why) = self.fits(&shape) {
            return Ok(Err(why));
        }
        let deadline = self.deadline();
        let mut runs = Vec::new();
        let mut before = self.probe.rates().await?;
        while runs.len() < self.repeat && Instant::now() < deadline {
            let arrivals = once(self, shape, deadline).await?;
            self.settle().await?;
            let after = self.probe.rates().await?;
            runs.extend(arrivals.map(|arrivals| Run { arrivals, rates: before.between(after) }));
            before = after;
            self.progress.step();
        }
        Ok(if runs.is_empty() { Err(late(self.limit)) } else { Ok(runs) })
    }

    /// The requests of a shape, all their tokens. `None`: not done in time.
    ///
    /// # Errors
    /// When a request fails.
    pub async fn whole(&mut self, shape: Shape, deadline: Instant) -> Result<Option<Arrivals>> {
        let arrivals = self.streams(shape, deadline).await?;
        let done = arrivals.iter().all(|times| times.len() == shape.tokens);
        Ok(done.then_some(arrivals))
    }

    /// The requests of a shape until all of them together have drawn its tokens. `None`: not done in time.
    ///
    /// # Errors
    /// When a request fails.
    pub async fn decoding(&mut self, shape: Shape, deadline: Instant) -> Result<Option<Arrivals>> {
        let endless = self.context_limit - shape.prompt;
        let requests = (0..shape.streams).map(|_| self.request(shape.prompt, endless)).collect();
        let measured = async |tokens: &mut Tokens| {
            tokens.until(|times| together(times) > shape.tokens).await;
            Ok(std::mem::take(&mut tokens.times))
        };
        during(&self.target, requests, Instant::now(), deadline, measured).await
    }

    /// Waits until what was given up is out of the way: it ends with the step that it is in.
    ///
    /// # Errors
    /// When the target does not answer.
    pub async fn settle(&mut self) -> Result<()> {
        self.streams(Shape { streams: 1, prompt: 1, tokens: 1 }, Instant::now() + SETTLE).await.map(drop)
    }

    fn fits(&self, shape: &Shape) -> Result<(), String> {
        let needed = shape.prompt + shape.tokens;
        let limit = self.context_limit;
        if needed > limit { Err(format!("needs {needed} tokens, the context is {limit}")) } else { Ok(()) }
    }

    /// Runs the requests of a shape side by side and returns when each token arrived, in seconds since they were sent.
    /// At `deadline` what has not arrived is given up.
    ///
    /// # Errors
    /// When a request is refused, fails, or ends early.
    pub async fn streams(&mut self, shape: Shape, deadline: Instant) -> Result<Arrivals> {
        let Shape { streams, prompt, tokens } = shape;
        let requests: Vec<GenerateRequest> = (0..streams).map(|_| self.request(prompt, tokens)).collect();
        let start = Instant::now();
        let running = requests.into_iter().map(|request| arrivals(&self.target, request, start, deadline));
        let all = try_join_all(running)
            .await
            .with_context(|| format!("{streams} requests of {prompt} prompt tokens for {tokens} tokens"))?;
        if let Some(short) = all.iter().find(|times| times.len() != tokens)
            && Instant::now() < deadline
        {
            bail!("a request ended after {} tokens, expected {tokens}", short.len());
        }
        Ok(all)
    }

    /// Greedy, past any end of sequence.
    pub fn request(&mut self, prompt: usize, tokens: usize) -> GenerateRequest {
        GenerateRequest {
            prompt: Some(target::tokens(self.prompts.draw(prompt))),
            sampling: Some(SamplingOptions { temperature: Some(0.0), ..SamplingOptions::default() }),
            max_tokens: Some(tokens as u32),
            ignore_eos: true,
            // Ours comes first: what a server cuts for itself takes other requests along.
            timeout_ms: (self.limit + SETTLE).as_millis() as u64,
            ..GenerateRequest::default()
        }
    }
}

/// `1 stream`, `8 streams`
pub fn counted(streams: usize) -> String {
    format!("{streams} stream{}", if streams == 1 { "" } else { "s" })
}

fn skipped<const N: usize>(names: &[String; N], units: [Unit; N], why: &str) -> Vec<Figure> {
    names.iter().zip(units).map(|(name, unit)| Figure::skipped(name, unit, why)).collect()
}

/// When each token of a request arrived; fewer than asked for when the time is over.
///
/// # Errors
/// When it is refused or fails.
pub async fn arrivals(
    target: &Target,
    request: GenerateRequest,
    start: Instant,
    deadline: Instant,
) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    each_arrival(target, request, start, deadline, |seconds| times.push(seconds)).await?;
    Ok(times)
}

/// Tells of each token of a request, at how many seconds after `start` it arrived, until `deadline`.
///
/// # Errors
/// When it is refused or fails.
pub async fn each_arrival(
    target: &Target,
    request: GenerateRequest,
    start: Instant,
    deadline: Instant,
    mut arrived: impl FnMut(f64),
) -> Result<()> {
    let Ok(events) = timeout_at(deadline, target.generate(request)).await else { return Ok(()) };
    let mut events = events?;
    while let Ok(Some(event)) = timeout_at(deadline, events.next()).await {
        if let Some(Event::Delta(delta)) = event?.event {
            delta.tokens.iter().for_each(|_| arrived(start.elapsed().as_secs_f64()));
        }
    }
    Ok(())
}
