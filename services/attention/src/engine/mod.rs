//! The engine: one thread that owns the trunk, the cache blocks and all sequences, and runs step after step.
//!
//! A step: take in what was submitted; end what was cancelled or is late; plan ([`crate::scheduler`]); compute
//! ([`crate::forward`]); hand out scores and tokens. With nothing to do the thread sleeps on its channel.

mod deliver;
mod retry;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use conclave_kernels::KernelError;
use conclave_serve::Error;
use tracing::Span;

use self::retry::Backoff;
use crate::cache::BlockPool;
use crate::forward::{MoeCaller, StepError, StepReport};
use crate::metrics::Metrics;
use crate::sampler::TokenMask;
use crate::scheduler::{self, Demand, Halves, Limits, Load, MicroBatches, Plan, Queue, StepTimes, Took};
use crate::sequence::{End, Sequence};
use crate::state::State;
use crate::trunk::{StepRows, Trunk};

/// What an engine is made of.
pub(crate) struct Parts<T> {
    pub(crate) trunk: T,
    pub(crate) moe: MoeCaller,
    pub(crate) limits: Limits,
    /// Time that a step may take while somebody decodes.
    pub(crate) step_target: Duration,
    pub(crate) micro_batches: MicroBatches,
    pub(crate) mask: TokenMask,
    pub(crate) moe_retry_limit: Duration,
    pub(crate) prefix_cache: bool,
    pub(crate) submitted: Receiver<Sequence>,
    pub(crate) state: Arc<State>,
    pub(crate) metrics: Metrics,
}

/// The engine. Everybody running arrived before everybody waiting; both are in order of arrival.
pub(crate) struct Engine<T> {
    parts: Parts<T>,
    pool: BlockPool,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    backoff: Backoff,
    times: StepTimes,
    halves: Halves,
    logits: Vec<f32>, // [R, vocab]
}

/// How a sequence that ends now ends.
type Ending = Result<End, Error>;

impl<T: Trunk> Engine<T> {
    pub(crate) fn new(parts: Parts<T>) -> Self {
        let blocks = parts.trunk.shape().blocks;
        let pool = if parts.prefix_cache { BlockPool::new(blocks) } else { BlockPool::without_prefixes(blocks) };
        parts.metrics.blocks_total.set(pool.total() as i64);
        let (running, waiting) = (Vec::new(), VecDeque::new());
        let halves = Halves::new(parts.micro_batches);
        Self {
            parts,
            pool,
            running,
            waiting,
            backoff: Backoff::default(),
            times: StepTimes::default(),
            halves,
            logits: Vec::new(),
        }
    }

    /// Runs until the service is gone or the device has failed.
    pub(crate) fn run(mut self) {
        let _stopped = StopOnDrop(Arc::clone(&self.parts.state));
        while self.receive() {
            self.sweep();
            if self.backoff.over(Instant::now())
                && let Err(error) = self.step()
            {
                tracing::error!(%error, sequences = self.running.len(), "engine stops");
                return;
            }
            self.show();
        }
    }

    /// Takes in what was submitted; sleeps when there is nothing else to do. False: the service is gone.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.parts.submitted.recv() {
                Ok(sequence) => self.waiting.push_back(sequence),
                Err(_) => return false,
            }
        } else if let Some(pause) = self.pause() {
            match self.parts.submitted.recv_timeout(pause) {
                Ok(sequence) => self.waiting.push_back(sequence),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.parts.submitted.try_recv() {
                Ok(sequence) => self.waiting.push_back(sequence),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// How long to leave the experts alone, at most until the next deadline.
    fn pause(&self) -> Option<Duration> {
        let now = Instant::now();
        let until = self.backoff.until().filter(|until| *until > now)?;
        let deadlines = self.running.iter().chain(&self.waiting).filter_map(|sequence| sequence.deadline);
        Some(deadlines.fold(until, Instant::min).saturating_duration_since(now))
    }

    /// Ends sequences that nobody listens to any more and those past their deadline.
    fn sweep(&mut self) {
        let now = Instant::now();
        for index in (0..self.waiting.len()).rev() {
            if self.waiting[index].abandoned() {
                self.waiting.remove(index);
            } else if let Some(error) = self.waiting[index].late(now)
                && let Some(sequence) = self.waiting.remove(index)
            {
                sequence.fail(error);
            }
        }
        for index in (0..self.running.len()).rev() {
            if self.running[index].abandoned() {
                self.release(index);
            } else if let Some(error) = self.running[index].late(now) {
                self.release(index).fail(error);
            }
        }
    }

    /// Takes a sequence out and frees its blocks.
    fn release(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        sequence.blocks.clear(&mut self.pool);
        sequence
    }

    /// Plans, computes and delivers one step. Routed experts that fail are seen to here; a device that fails is the end.
    fn step(&mut self) -> Result<(), KernelError> {
        let (shares, load) = self.plan();
        let (rows, owners) = self.assemble(&shares);
        if rows.is_empty() {
            return Ok(());
        }
        self.parts.metrics.begin_step(load);
        self.show();
        let started = Instant::now();
        let span = self.span(&owners, rows.len());
        let _entered = span.enter();
        match self.compute(rows, started) {
            Ok(report) => {
                self.backoff.reset();
                report.waits.iter().for_each(|wait| self.parts.metrics.expert_wait_seconds.observe(wait.as_secs_f64()));
                self.deliver(&shares, &report)?;
                let seconds = started.elapsed().as_secs_f64();
                self.times.observe(load, seconds);
                self.parts.metrics.end_step(load, seconds);
            }
            Err(StepError::Routed(error)) => self.cut(&shares, &error, started),
            Err(StepError::Device(error)) => return Err(error),
        }
        Ok(())
    }

    /// Preempts and admits; the rows of each running sequence, and what they come to.
    fn plan(&mut self) -> (Vec<usize>, Load) {
        let running: Vec<Demand> = self.running.iter().map(Sequence::demand).collect();
        let waiting = self.waiting_demands();
        let queue = Queue { running: &running, waiting: &waiting, free: self.pool.free() };
        let target = self.parts.step_target.as_secs_f64();
        let plan = scheduler::plan_within(&self.parts.limits, &self.times, target, queue);
        let load = plan.load(queue);
        (self.carry_out(plan), load)
    }

    fn carry_out(&mut self, Plan { preempt, admit, rows }: Plan) -> Vec<usize> {
        for _ in 0..preempt {
            let mut sequence = self.release(self.running.len() - 1);
            sequence.restart();
            self.waiting.push_front(sequence);
            self.parts.metrics.preemptions.inc();
        }
        for mut sequence in self.waiting.drain(..admit) {
            let first = !sequence.started;
            sequence.begin(&mut self.pool, self.parts.limits.block);
            if first {
                self.parts.metrics.queue_seconds.observe(sequence.arrived.elapsed().as_secs_f64());
                self.parts.metrics.prompt_tokens.inc_by(sequence.prompt_len() as u64);
                self.parts.metrics.cached_tokens.inc_by(sequence.cached() as u64);
            }
            self.running.push(sequence);
        }
        rows
    }

    /// Of the waiting sequences that may begin now.
    fn waiting_demands(&mut self) -> Vec<Demand> {
        let Limits { max_running, block, .. } = self.parts.limits;
        let may_begin = max_running.saturating_sub(self.running.len());
        self.waiting.iter_mut().take(may_begin).map(|sequence| sequence.demand_after(&self.pool, block)).collect()
    }

    /// The step's rows, and the sequences they belong to; takes the blocks that they need.
    fn assemble(&mut self, shares: &[usize]) -> (StepRows, Vec<usize>) {
        let block = self.parts.limits.block;
        let (mut step, mut owners) = (StepRows::default(), Vec::new());
        for (index, (sequence, rows)) in self.running.iter_mut().zip(shares).enumerate() {
            if *rows == 0 {
                continue;
            }
            let end = sequence.computed + rows;
            sequence.blocks.grow(&mut self.pool, end, block).expect("the plan counts the free blocks");
            step.push(&sequence.tokens()[sequence.computed..end], sequence.computed, sequence.blocks.blocks(), block);
            owners.push(index);
        }
        (step, owners)
    }

    fn compute(&mut self, rows: StepRows, now: Instant) -> Result<StepReport, StepError> {
        let limit = self.parts.moe_retry_limit;
        let until = self.running.iter().map(|sequence| sequence.patience(now, limit)).min();
        let (count, halve) = (rows.len(), self.halves.halve(rows.len()));
        let parts = if halve { rows.halves().into() } else { vec![rows] };
        self.parts.metrics.halved_steps.inc_by(u64::from(halve));
        let report = self.parts.moe.run(&mut self.parts.trunk, parts, until)?;
        let waited = report.waits.iter().sum::<Duration>().as_secs_f64();
        self.halves.observe(count, halve, Took { seconds: now.elapsed().as_secs_f64(), waited });
        Ok(report)
    }

    /// A span in the trace of the oldest request, linked to those of the others.
    fn span(&self, owners: &[usize], rows: usize) -> Span {
        let mut spans = owners.iter().map(|index| &self.running[*index].span);
        let Some(first) = spans.next() else {
            return Span::none();
        };
        let span = tracing::info_span!(parent: first, "step", rows, sequences = owners.len());
        spans.for_each(|other| {
            span.follows_from(other);
        });
        span
    }

    fn show(&self) {
        let (running, waiting, free) = (self.running.len(), self.waiting.len(), self.pool.free());
        self.parts.state.show(running, free);
        self.parts.metrics.running.set(running as i64);
        self.parts.metrics.waiting.set(waiting as i64);
        self.parts.metrics.blocks_used.set((self.pool.total() - free) as i64);
        self.parts.metrics.blocks_idle.set(self.pool.idle() as i64);
        self.parts.metrics.blocks_evicted.inc_by(self.pool.evicted() - self.parts.metrics.blocks_evicted.get());
    }
}

/// Tells everybody that the engine has ended, however it did.
struct StopOnDrop(Arc<State>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}
