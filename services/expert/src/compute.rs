//! The compute thread: takes what waits for one layer, runs it as one grouped FFN, answers.

use std::cell::OnceCell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use conclave_cluster::MemberState;
use conclave_dispatch::ModelShape;
use conclave_kernels::{Device, Ffn, KernelError};
use conclave_proto::v1::{Activation, ExpertBatch, ExpertResult, WorkError, WorkErrorKind};
use conclave_serve::lane::{self, Lane};
use prometheus::{Counter, IntCounter};
use tokio::sync::{Notify, watch};
use tracing::Span;

use crate::cells::Cells;
use crate::merge::{self, Input, Scratch, Sums};
use crate::metrics::Metrics;
use crate::pair::ShardPair;
use crate::queue::LayerQueues;
use crate::reply::Reply;
use crate::validate::work_error;

/// A grouped FFN takes less: a compute thread that is at one for so long is stuck.
const LONGEST_RUN: Duration = Duration::from_secs(60);

/// A checked batch that waits. It keeps the cells that it was accepted for.
pub(crate) struct Job<D: Device> {
    pub(crate) batch: ExpertBatch,
    /// Of the stream that it came over.
    pub(crate) pair: Option<Arc<ShardPair<D>>>,
    pub(crate) cells: Arc<Cells<D::Matrix>>,
    pub(crate) arrived: Instant,
    pub(crate) reply: Reply,
    pub(crate) span: Span,
}

/// What the service and its compute thread share.
pub(crate) struct Shared<D: Device> {
    state: Mutex<State<D>>,
    /// Told when there is something to do, or the end has come.
    ready: Notify,
    /// Run by the compute thread while it waits for work.
    lane: Arc<Lane>,
    /// Told whenever nothing is left to do.
    idle: Notify,
    metrics: Metrics,
}

struct State<D: Device> {
    queues: LayerQueues<Job<D>>,
    /// Taken from the queues and not yet answered.
    running: usize,
    /// Since when.
    since: Instant,
    closed: bool,
}

/// Why a job was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The bound on waiting rows is reached.
    Full { waiting: usize },
    /// The compute thread has ended.
    Closed,
}

impl<D: Device> Shared<D> {
    pub(crate) fn new(queue_rows: usize, lane: Arc<Lane>, metrics: Metrics) -> Arc<Self> {
        let queues = LayerQueues::new(queue_rows);
        let state = State { queues, running: 0, since: Instant::now(), closed: false };
        Arc::new(Self { state: Mutex::new(state), ready: Notify::new(), lane, idle: Notify::new(), metrics })
    }

    pub(crate) fn lane(&self) -> &Arc<Lane> {
        &self.lane
    }

    /// Whether the compute thread is at work, and not for so long that it must be stuck.
    pub(crate) fn is_working(&self, now: Instant) -> bool {
        let state = self.lock();
        state.running > 0 && now.saturating_duration_since(state.since) < LONGEST_RUN
    }

    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error has the job.
    pub(crate) fn push(&self, layer: u32, job: Job<D>) -> Result<(), (Refusal, Box<Job<D>>)> {
        let mut state = self.lock();
        if state.closed {
            return Err((Refusal::Closed, Box::new(job)));
        }
        let waiting = state.queues.rows();
        if let Err(job) = state.queues.push(layer, job.batch.rows as usize, job) {
            return Err((Refusal::Full { waiting }, Box::new(job)));
        }
        self.metrics.queue_rows.set(state.queues.rows() as i64);
        self.ready.notify_one();
        Ok(())
    }

    pub(crate) fn queued_rows(&self) -> u32 {
        self.lock().queues.rows() as u32
    }

    /// Ends the compute thread; what waits is dropped.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.queues.clear();
        self.ready.notify_one();
        self.idle.notify_waiters();
    }

    /// Resolves when nothing waits and nothing runs.
    pub(crate) async fn drained(&self) {
        loop {
            let idle = self.idle.notified();
            {
                let state = self.lock();
                if state.closed || (state.running == 0 && state.queues.rows() == 0) {
                    return;
                }
            }
            idle.await;
        }
    }

    /// Waits for work. `None` when closed. After work the next is likely to follow soon.
    fn take(&self, merge_rows: usize, after_work: bool) -> Option<(u32, Vec<Job<D>>)> {
        self.lane.block_on(async {
            if after_work {
                self.lane.stirrer().stir();
            }
            // Answers go out, and what has come meanwhile comes in.
            lane::turn().await;
            loop {
                let ready = self.ready.notified();
                match self.poll(merge_rows) {
                    Some(found) => return found,
                    None => ready.await,
                }
            }
        })
    }

    /// What is to be done now: work, or `Some(None)` at the end.
    fn poll(&self, merge_rows: usize) -> Option<Option<(u32, Vec<Job<D>>)>> {
        let mut state = self.lock();
        if state.closed {
            return Some(None);
        }
        let (layer, jobs) = state.queues.take(merge_rows)?;
        (state.running, state.since) = (jobs.len(), Instant::now());
        self.metrics.queue_rows.set(state.queues.rows() as i64);
        Some(Some((layer, jobs)))
    }

    fn finished(&self) {
        let mut state = self.lock();
        state.running = 0;
        if state.queues.rows() == 0 {
            self.idle.notify_waiters();
        }
    }
}

/// Everything that the compute thread works with.
pub(crate) struct Worker<D: Device> {
    pub(crate) device: Arc<D>,
    pub(crate) shape: ModelShape,
    pub(crate) shared: Arc<Shared<D>>,
    pub(crate) merge_rows: usize,
    pub(crate) metrics: Metrics,
    /// Rows and busy seconds of each group's cell, looked up once.
    pub(crate) cell_metrics: Vec<OnceCell<(IntCounter, Counter)>>,
    pub(crate) member_state: watch::Sender<MemberState>,
}

/// Makes the shard leave when its compute thread ends, however it ends.
struct Ending<'a, D: Device>(&'a Worker<D>);

impl<D: Device> Drop for Ending<'_, D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("compute thread has panicked");
        }
        self.0.member_state.send_replace(MemberState::Leaving);
        self.0.shared.close();
    }
}

impl<D: Device> Worker<D> {
    /// Runs until the service closes the queue or the device has failed.
    pub(crate) fn run(self) {
        let _ending = Ending(&self);
        let mut scratch = Scratch::default();
        let mut after_work = false;
        while let Some((layer, jobs)) = self.shared.take(self.merge_rows, after_work) {
            after_work = true;
            let now = Instant::now();
            let wanted: Vec<Job<D>> = jobs.into_iter().filter_map(|job| self.still_wanted(job, now)).collect();
            if !wanted.is_empty()
                && let Err(error) = self.compute(layer, wanted, &mut scratch)
            {
                tracing::error!(%error, "compute thread stops");
                return;
            }
            self.shared.finished();
        }
    }

    /// Leaves out what nobody waits for and answers what is too late.
    fn still_wanted(&self, job: Job<D>, now: Instant) -> Option<Job<D>> {
        if !job.reply.is_wanted() {
            self.metrics.dropped.inc();
            if !job.batch.board_rows.is_empty() {
                // Its caller waits for its turn to end.
                self.refuse(job, work_error(WorkErrorKind::Expired, "cancelled"));
            }
            return None;
        }
        let waited = now.saturating_duration_since(job.arrived);
        let budget = Duration::from_micros(job.batch.budget_us);
        if job.batch.budget_us != 0 && waited >= budget {
            self.metrics.refused.with_label_values(&["expired"]).inc();
            let message = format!("budget of {} ms spent in the queue", budget.as_millis());
            self.refuse(job, work_error(WorkErrorKind::Expired, message));
            return None;
        }
        Some(job)
    }

    fn compute(&self, layer: u32, jobs: Vec<Job<D>>, scratch: &mut Scratch) -> Result<(), KernelError> {
        let started = Instant::now();
        let batches: Vec<Input<'_, D>> =
            jobs.iter().map(|job| Input { batch: &job.batch, pair: job.pair.as_deref() }).collect();
        let expert = |job: usize, expert: u32| -> Option<&Ffn<D::Matrix>> {
            jobs[job].cells.get(self.shape.group_of(expert))?.expert(layer, expert)
        };
        let sums = match merge::run(&*self.device, &self.shape, scratch, &batches, expert) {
            Ok(sums) => sums,
            Err(error) => {
                jobs.into_iter()
                    .for_each(|job| self.refuse(job, work_error(WorkErrorKind::Internal, error.to_string())));
                return Err(error);
            }
        };
        let busy = started.elapsed();
        self.observe(&jobs, busy);
        let queued_rows = self.shared.queued_rows();
        for (job, sums) in jobs.into_iter().zip(sums) {
            self.answer(job, sums, Times { started, busy }, queued_rows);
        }
        Ok(())
    }

    /// Answers a job that is not computed.
    fn refuse(&self, job: Job<D>, error: WorkError) {
        let answer = failed(&job.batch, error, self.shared.queued_rows());
        job.reply.send(answer);
    }

    fn answer(&self, job: Job<D>, sums: Sums, times: Times, queued_rows: u32) {
        let waited = times.started.saturating_duration_since(job.arrived);
        self.metrics.queue_seconds.observe(waited.as_secs_f64());
        let (queue_us, busy_us) = (waited.as_micros() as u64, times.busy.as_micros() as u64);
        job.span.record("queue_us", queue_us).record("busy_us", busy_us);
        if let Some(pair) = job.pair.filter(|_| sums.in_pair) {
            let rows: usize = sums.parts.iter().map(|part| part.row_index.len()).sum();
            pair.send(rows * self.shape.hidden * self.device.activation().size());
        }
        let result = ExpertResult {
            id: job.batch.id,
            activation: Activation::from(self.device.activation()).into(),
            hidden: job.batch.hidden,
            sums: sums.parts,
            error: None,
            queue_us,
            busy_us,
            queued_rows,
            sums_in_pair: sums.in_pair,
            ..ExpertResult::default()
        };
        job.reply.send(result);
    }

    /// Counts rows and busy time; the time is shared out by pairs.
    fn observe(&self, jobs: &[Job<D>], busy: Duration) {
        let rows: u32 = jobs.iter().map(|job| job.batch.rows).sum();
        self.metrics.merged_rows.observe(f64::from(rows));
        self.metrics.merged_batches.observe(jobs.len() as f64);
        self.metrics.busy_seconds.observe(busy.as_secs_f64());
        let all: usize = jobs.iter().map(|job| job.batch.row_index.len()).sum();
        for job in jobs {
            let counts = job.batch.experts.iter().zip(&job.batch.counts).collect::<Vec<_>>();
            for same in counts.chunk_by(|a, b| self.shape.group_of(*a.0) == self.shape.group_of(*b.0)) {
                let Some(cell) = job.cells.get(self.shape.group_of(*same[0].0)) else { continue };
                let pairs: u64 = same.iter().map(|(_, count)| u64::from(**count)).sum();
                let share = busy.mul_f64(pairs as f64 / all.max(1) as f64);
                cell.rows.fetch_add(pairs, Ordering::Relaxed);
                cell.busy_us.fetch_add(share.as_micros() as u64, Ordering::Relaxed);
                let (rows, seconds) = self.cell_metrics[cell.id.group.index()].get_or_init(|| {
                    let name = cell.id.to_string();
                    let rows = self.metrics.cell_rows.with_label_values(&[&name]);
                    (rows, self.metrics.cell_busy.with_label_values(&[&name]))
                });
                rows.inc_by(pairs);
                seconds.inc_by(share.as_secs_f64());
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Times {
    started: Instant,
    busy: Duration,
}

/// The answer to a batch that was not computed.
pub(crate) fn failed(batch: &ExpertBatch, error: WorkError, queued_rows: u32) -> ExpertResult {
    ExpertResult { id: batch.id, error: Some(error), queued_rows, ..ExpertResult::default() }
}
