//! The service: accepts batches, holds cells, leaves in order.

use std::cell::OnceCell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use conclave_cluster::MemberState;
use conclave_dispatch::pair::Way;
use conclave_dispatch::{LinkError, ModelShape, ShardLink};
use conclave_kernels::{Device, KernelError};
use conclave_model::Checkpoint;
use conclave_proto::CellId;
use conclave_proto::v1::{
    CellLoad, ExpertBatch, ExpertResult, ExpertStatus, PairGrant, PairOffer, WorkError, WorkErrorKind, WorkId,
};
use conclave_serve::{Lane, telemetry};
use prometheus::Registry;
use tokio::sync::{Mutex, oneshot, watch};
use tracing::Span;

use crate::cells::{self, Cells};
use crate::compute::{Job, Refusal, Shared, Worker, failed};
use crate::config::ExpertConfig;
use crate::error::ExpertError;
use crate::metrics::Metrics;
use crate::pair::{OpenPair, ShardPair, ShardPairs};
use crate::reply::{Cancelled, Reply};
use crate::self_check;
use crate::validate::{self, Expected, work_error};

/// An expert shard.
pub struct ExpertService<D: Device> {
    config: ExpertConfig,
    device: Arc<D>,
    checkpoint: Arc<Checkpoint>,
    shape: ModelShape,
    shared: Arc<Shared<D>>,
    cells: RwLock<Arc<Cells<D::Matrix>>>,
    /// Held while cells change: one change at a time.
    changing: Mutex<()>,
    held: watch::Sender<Vec<CellId>>,
    state: watch::Sender<MemberState>,
    pairs: Arc<ShardPairs<D>>,
    metrics: Metrics,
}

impl<D: Device> ExpertService<D> {
    /// Loads the cells and starts the compute thread. Blocks while it reads the weights.
    ///
    /// # Errors
    /// When a cell is not in the model, its weights cannot be read or do not fit, or there is no thread.
    pub fn start(
        config: ExpertConfig,
        device: Arc<D>,
        checkpoint: Arc<Checkpoint>,
        cells: &[CellId],
        registry: &Registry,
    ) -> Result<Arc<Self>, ExpertError> {
        let shape =
            ModelShape::new(&checkpoint)?.ok_or_else(|| ExpertError::Dense(checkpoint.dir().display().to_string()))?;
        let metrics = Metrics::new(registry);
        let service = Arc::new(Self {
            shared: Shared::new(config.queue_rows, Lane::start("expert-lane")?, metrics.clone()),
            cells: RwLock::new(Arc::new(Cells::new(shape.groups))),
            changing: Mutex::default(),
            held: watch::Sender::new(Vec::new()),
            state: watch::Sender::new(MemberState::Loading),
            pairs: ShardPairs::new(metrics.pairs.clone()),
            config,
            device,
            checkpoint,
            shape,
            metrics,
        });
        service.load(cells)?;
        let worker = Worker {
            device: service.device.clone(),
            shape: service.shape.clone(),
            shared: service.shared.clone(),
            merge_rows: service.config.merge_rows,
            cell_metrics: (0..service.shape.groups).map(|_| OnceCell::new()).collect(),
            metrics: service.metrics.clone(),
            member_state: service.state.clone(),
        };
        std::thread::Builder::new().name("expert-compute".to_owned()).spawn(move || worker.run())?;
        service.state.send_replace(MemberState::Ready);
        Ok(service)
    }

    /// Compares the device with the definition on a few rows of each cell. Blocks.
    ///
    /// # Errors
    /// When a result is not finite or too far off.
    pub fn self_check(&self) -> Result<(), ExpertError> {
        let cells = self.cells();
        cells.iter().try_for_each(|cell| self_check::check(&*self.device, &self.checkpoint, &self.shape, cell))
    }

    /// Loads and checks cells, then serves them. Blocks while it reads the weights.
    fn load(&self, ids: &[CellId]) -> Result<(), ExpertError> {
        cells::check_ids(&self.shape, ids)?;
        let held = self.cells().ids();
        let missing: Vec<CellId> = ids.iter().filter(|id| !held.contains(id)).copied().collect();
        let cell = self.checkpoint.cell_bytes(self.device.fp8_weights());
        self.checkpoint.check_memory(cell * missing.len() as u64)?;
        let started = Instant::now();
        let loaded = cells::load(&*self.device, &self.checkpoint, &self.config.progress, &self.shape, &missing)?;
        for cell in &loaded {
            self_check::check(&*self.device, &self.checkpoint, &self.shape, cell)?;
            self.metrics.cell_bytes.with_label_values(&[&cell.id.to_string()]).set(cell.bytes as i64);
        }
        let names: Vec<String> = missing.iter().map(CellId::to_string).collect();
        let (bytes, ms) = (loaded.iter().map(|cell| cell.bytes).sum::<u64>(), started.elapsed().as_millis() as u64);
        tracing::info!(cells = names.join(","), bytes, ms, "cells loaded");
        self.replace(self.cells().with(loaded));
        Ok(())
    }

    /// Takes cells on beside those held. What is held already is left as it is.
    ///
    /// # Errors
    /// As for [`Self::start`]; nothing has changed then.
    pub async fn load_cells(self: &Arc<Self>, ids: Vec<CellId>) -> Result<Vec<CellId>, ExpertError> {
        let _changing = self.changing.lock().await;
        if *self.state.borrow() == MemberState::Leaving {
            return Err(ExpertError::Leaving);
        }
        let service = self.clone();
        let loading = tokio::task::spawn_blocking(move || service.load(&ids));
        loading.await.map_err(std::io::Error::other)??;
        Ok(self.cells().ids())
    }

    /// Gives cells up. Work accepted for them is finished; then their memory is free.
    ///
    /// # Errors
    /// When the model has no such cell.
    pub async fn unload_cells(&self, ids: &[CellId]) -> Result<Vec<CellId>, ExpertError> {
        let _changing = self.changing.lock().await;
        cells::check_ids(&self.shape, ids)?;
        self.replace(self.cells().without(ids));
        for id in ids {
            let _ = self.metrics.cell_bytes.remove_label_values(&[&id.to_string()]);
        }
        Ok(self.cells().ids())
    }

    fn replace(&self, cells: Cells<D::Matrix>) {
        let ids = cells.ids();
        *self.cells.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(cells);
        self.held.send_replace(ids);
    }

    pub(crate) fn cells(&self) -> Arc<Cells<D::Matrix>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes no new work from now on; resolves when the work it has is done.
    pub async fn drain(&self) {
        self.state.send_replace(MemberState::Leaving);
        self.shared.drained().await;
    }

    /// Where the shard is in its life. It leaves when drained, and when its compute thread ends.
    pub fn state(&self) -> watch::Receiver<MemberState> {
        self.state.subscribe()
    }

    /// The cells held, ascending.
    pub fn held(&self) -> watch::Receiver<Vec<CellId>> {
        self.held.subscribe()
    }

    /// The lane to serve this shard on: its compute thread runs it while it waits for work.
    pub fn lane(&self) -> &Arc<Lane> {
        self.shared.lane()
    }

    /// Whether work that was accepted and is not answered yet goes on.
    pub(crate) fn is_working(&self) -> bool {
        self.shared.is_working(Instant::now())
    }

    /// How often a caller that waits is told so.
    pub(crate) fn sign_every(&self) -> Duration {
        self.config.sign_every
    }

    /// Id of this member.
    pub fn instance(&self) -> &str {
        &self.config.instance
    }

    /// Fingerprint of the checkpoint.
    pub fn fingerprint(&self) -> &str {
        self.checkpoint.fingerprint()
    }

    /// What it holds and how it is loaded.
    pub fn status(&self) -> ExpertStatus {
        let state = match *self.state.borrow() {
            MemberState::Loading => "loading",
            MemberState::Ready => "ready",
            MemberState::Leaving => "leaving",
        };
        let cells = self.cells();
        let loads = cells.iter().map(|cell| CellLoad {
            cell: Some(cell.id.into()),
            rows: cell.rows.load(Ordering::Relaxed),
            busy_us: cell.busy_us.load(Ordering::Relaxed),
            bytes: cell.bytes,
        });
        ExpertStatus {
            instance: self.config.instance.clone(),
            fingerprint: self.fingerprint().to_owned(),
            numerics: self.device.numerics(),
            state: state.to_owned(),
            cells: loads.collect(),
            queued_rows: self.shared.queued_rows(),
        }
    }

    /// Runs one batch; what is wrong with it stands in the answer. Dropping the future drops the work if it still waits.
    pub async fn run(&self, batch: ExpertBatch) -> ExpertResult {
        let id = batch.id;
        let (reply, answer) = oneshot::channel();
        self.submit(batch, None, Reply::Task(reply, Cancelled::default()));
        answered(id, answer).await
    }

    /// The same of a batch that has come over a stream with or without a pair. It is taken at once.
    pub(crate) fn begin(
        self: &Arc<Self>,
        batch: ExpertBatch,
        pair: Option<Arc<ShardPair<D>>>,
        cancelled: Cancelled,
    ) -> impl Future<Output = ExpertResult> + use<D> {
        let id = batch.id;
        let (reply, answer) = oneshot::channel();
        self.take(batch, pair, Reply::Task(reply, cancelled));
        answered(id, answer)
    }

    /// Takes a batch of a caller, with the rows that come by `pair`, of the stream that it came over.
    pub(crate) fn take(self: &Arc<Self>, batch: ExpertBatch, pair: Option<Arc<ShardPair<D>>>, reply: Reply) {
        let by_pair = pair.clone().filter(|_| !batch.board_rows.is_empty());
        let Some(from) = by_pair else { return self.submit(batch, pair, reply) };
        // Whatever else is wrong with the batch, they come.
        let bytes = batch.board_rows.len() * self.shape.hidden * self.device.activation().size();
        let service = self.clone();
        let came = move |result: Result<(), KernelError>| match result {
            Ok(()) => service.submit(batch, pair, reply),
            Err(_) => reply.send(ExpertResult { id: batch.id, pair_lost: true, ..ExpertResult::default() }),
        };
        from.receive(bytes, Box::new(came));
    }

    /// Answers a caller's offer of a pair.
    pub(crate) fn grant(&self, offer: &PairOffer) -> (PairGrant, Option<OpenPair<D>>) {
        let (asked, way) = (&self.config.pairs, Way::of(offer));
        if asked.contains(&way) {
            return self.pairs.grant(&self.device, offer);
        }
        let refused = match asked[..] {
            [] => "nothing but messages is asked for here".to_owned(),
            _ => format!("payload {} is not asked for here", way.name()),
        };
        (PairGrant { refused, ..PairGrant::default() }, None)
    }

    /// Checks a batch and queues it, or answers that it is refused; `pair`: of the stream that it came over.
    fn submit(&self, batch: ExpertBatch, pair: Option<Arc<ShardPair<D>>>, reply: Reply) {
        let cells = self.cells();
        let layer = match self.check(&batch, pair.as_deref(), &cells) {
            Ok(layer) => layer,
            Err(error) => return self.refuse(&batch, error, reply),
        };
        let span = span(layer, &batch);
        let job = Job { batch, pair, cells, arrived: Instant::now(), reply, span };
        if let Err((refusal, job)) = self.shared.push(layer, job) {
            let error = match refusal {
                Refusal::Full { waiting } => {
                    let message = format!("queue: {waiting} rows wait, at most {}", self.config.queue_rows);
                    work_error(WorkErrorKind::Overloaded, message)
                }
                Refusal::Closed => work_error(WorkErrorKind::Internal, "the compute thread has ended"),
            };
            self.refuse(&job.batch, error, job.reply);
        }
    }

    fn refuse(&self, batch: &ExpertBatch, error: WorkError, reply: Reply) {
        let reason = error.kind().as_str_name().trim_start_matches("WORK_ERROR_KIND_").to_ascii_lowercase();
        self.metrics.refused.with_label_values(&[&reason]).inc();
        reply.send(failed(batch, error, self.shared.queued_rows()));
    }

    /// The layer of a batch that can be run here.
    fn check(
        &self,
        batch: &ExpertBatch,
        pair: Option<&ShardPair<D>>,
        cells: &Cells<D::Matrix>,
    ) -> Result<u32, WorkError> {
        if *self.state.borrow() == MemberState::Leaving {
            return Err(work_error(WorkErrorKind::Leaving, "this shard is leaving"));
        }
        let activation = self.device.activation();
        let row_bytes = self.shape.hidden * activation.size();
        let board_rows = pair.map(|pair| pair.board_rows(row_bytes));
        let expected = Expected { shape: &self.shape, activation, max_rows: self.config.max_rows, board_rows };
        validate::check(&expected, batch)?;
        match batch.groups.iter().find(|group| cells.get(**group).is_none()) {
            Some(group) => {
                let held: Vec<String> = cells.ids().iter().map(ToString::to_string).collect();
                let message = format!("cell {}: not held here (held: {})", self.shape.cell(*group), held.join(", "));
                Err(work_error(WorkErrorKind::NotHeld, message))
            }
            None => Ok(batch.id.unwrap_or_default().layer),
        }
    }
}

/// The answer to a batch that was taken.
async fn answered(id: Option<WorkId>, answer: oneshot::Receiver<ExpertResult>) -> ExpertResult {
    answer.await.unwrap_or_else(|_| {
        let error = work_error(WorkErrorKind::Internal, "the compute thread has ended");
        ExpertResult { id, error: Some(error), ..ExpertResult::default() }
    })
}

/// What a trace shows of a batch; a batch of no trace is not worth the time of a span.
fn span(layer: u32, batch: &ExpertBatch) -> Span {
    if batch.traceparent.is_empty() {
        return Span::none();
    }
    let (queue_us, busy_us) = (tracing::field::Empty, tracing::field::Empty);
    let span = tracing::info_span!("expert", layer, rows = batch.rows, queue_us, busy_us);
    telemetry::set_parent(&span, &batch.traceparent);
    span
}

impl<D: Device> Drop for ExpertService<D> {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[async_trait]
impl<D: Device> ShardLink for ExpertService<D> {
    async fn compute(&self, batch: ExpertBatch) -> Result<ExpertResult, LinkError> {
        Ok(self.run(batch).await)
    }

    fn alive(&self) -> bool {
        *self.state.borrow() != MemberState::Leaving
    }

    fn last_sign(&self, _: WorkId) -> Option<tokio::time::Instant> {
        self.is_working().then(tokio::time::Instant::now)
    }
}
