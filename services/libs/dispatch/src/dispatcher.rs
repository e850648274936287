//! The dispatcher: one layer's rows in, the routed output out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::{ClusterView, Membership};
use conclave_kernels::Published;
use conclave_proto::v1::{Activation, MoeInput, MoeOutput};
use conclave_proto::{CellId, InstanceId};
use conclave_serve::{Error, telemetry};
use prometheus::{IntCounter, Registry};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument;

use crate::call::Call;
use crate::combine::combine;
use crate::config::DispatchConfig;
use crate::error::MoeError;
use crate::gate::{self, Choices};
use crate::input;
use crate::link::{MoeLink, ShardConnector};
use crate::metrics::Metrics;
use crate::predict::HedgeBudget;
use crate::shape::ModelShape;
use crate::shards::{Shard, Table};

/// Runs MoE layers on the expert shards of a cluster.
pub struct Dispatcher {
    pub(crate) config: DispatchConfig,
    pub(crate) shape: ModelShape,
    pub(crate) connector: Arc<dyn ShardConnector>,
    pub(crate) metrics: Metrics,
    pub(crate) hedges: Mutex<HedgeBudget>,
    /// The replica of each group that was used last.
    pub(crate) last: Mutex<Vec<Option<InstanceId>>>,
    view: watch::Receiver<Arc<ClusterView>>,
    table: Mutex<(Option<Arc<ClusterView>>, Arc<Table>)>,
    cells: Vec<CellCount>,
}

struct CellCount {
    rows: AtomicU64,
    counter: IntCounter,
}

impl Dispatcher {
    /// A dispatcher over the expert members of a cluster.
    pub fn new(
        config: DispatchConfig,
        shape: ModelShape,
        membership: &dyn Membership,
        connector: Arc<dyn ShardConnector>,
        registry: &Registry,
    ) -> Arc<Self> {
        let metrics = Metrics::new(registry);
        let cells = (0..shape.groups as u32).map(|group| CellCount {
            rows: AtomicU64::new(0),
            counter: metrics.cell_rows.with_label_values(&[&shape.cell(group).to_string()]),
        });
        Arc::new(Self {
            cells: cells.collect(),
            last: Mutex::new(vec![None; shape.groups]),
            hedges: Mutex::default(),
            view: membership.watch(),
            table: Mutex::default(),
            config,
            shape,
            connector,
            metrics,
        })
    }

    /// Fingerprint of the checkpoint that this dispatcher works for.
    pub fn fingerprint(&self) -> &str {
        &self.config.fingerprint
    }

    /// (row, expert) pairs sent to each cell since the start.
    pub fn cell_rows(&self) -> Vec<(CellId, u64)> {
        let rows = self.cells.iter().enumerate();
        rows.map(|(g, cell)| (self.shape.cell(g as u32), cell.rows.load(Ordering::Relaxed))).collect()
    }

    /// How a shard does, as seen from here: `ok`, `set-aside` or `unknown`.
    pub fn health(&self, instance: &InstanceId) -> &'static str {
        self.shard(instance).map_or("unknown", |shard| if shard.is_aside() { "set-aside" } else { "ok" })
    }

    /// Rows that waited at a shard when it last answered; `None` where it is not known.
    pub fn queued_rows(&self, instance: &InstanceId) -> Option<u32> {
        self.shard(instance).map(|shard| shard.reported())
    }

    fn shard(&self, instance: &InstanceId) -> Option<Arc<Shard>> {
        self.table().shards.iter().find(|shard| shard.instance() == instance).cloned()
    }

    /// Runs one layer.
    ///
    /// # Errors
    /// When the input is malformed, a cell stays without a replica, or the budget is spent.
    pub async fn call(&self, input: MoeInput) -> Result<MoeOutput, MoeError> {
        self.call_with(input, None).await
    }

    /// Runs one layer, whose rows are on the board of this process's device where `published`.
    async fn call_with(&self, input: MoeInput, published: Option<Published>) -> Result<MoeOutput, MoeError> {
        let started = Instant::now();
        let result = match input.traceparent.is_empty() {
            // A call of no trace is not worth the time of a span.
            true => self.run(input, published).await,
            false => {
                let span = tracing::info_span!("moe", layer = input.layer, step = input.step, rows = input.rows);
                telemetry::set_parent(&span, &input.traceparent);
                self.run(input, published).instrument(span).await
            }
        };
        self.metrics.seconds.observe(started.elapsed().as_secs_f64());
        let outcome = match &result {
            Ok(_) => "ok",
            Err(MoeError::Invalid(_)) => "invalid",
            Err(MoeError::NoReplica { .. }) => "no_replica",
            Err(MoeError::Expired { .. }) => "expired",
            Err(MoeError::Internal(_)) => "internal",
        };
        self.metrics.calls.with_label_values(&[outcome]).inc();
        result
    }

    async fn run(&self, input: MoeInput, published: Option<Published>) -> Result<MoeOutput, MoeError> {
        let budget = match input.budget_us {
            0 => self.config.call_timeout,
            us => Duration::from_micros(us),
        };
        let input = input::check(&self.shape, self.config.max_rows, input)?;
        let bias = self.shape.bias.get(input.layer as usize).map_or(&[][..], Vec::as_slice);
        let choices = gate::select(&self.shape.gate, bias, &input.logits, input.rows)
            .map_err(|error| MoeError::Invalid(error.to_string()))?;
        self.observe_fan_out(&choices);
        let mut call = Call::new(self, input, choices, Instant::now() + budget, budget);
        call.published = published;
        let parts = call.run().await?;
        let shards = call.shards();
        self.metrics.shards_per_call.observe(f64::from(shards));
        let input = &call.input;
        let routed = combine(input.activation, self.shape.groups, self.shape.hidden, input.rows, parts);
        Ok(MoeOutput {
            step: input.step,
            layer: input.layer,
            attempt: input.attempt,
            activation: Activation::from(input.activation).into(),
            routed: routed.into(),
            error: None,
            mixed_numerics: call.mixed(),
            shards,
        })
    }

    fn observe_fan_out(&self, choices: &Choices) {
        let mut most = 0;
        for row in 0..choices.rows() {
            // Experts ascend, so those of one group are neighbours.
            let groups = choices.row(row).0.chunk_by(|a, b| self.shape.group_of(*a) == self.shape.group_of(*b)).count();
            self.metrics.groups_per_row.observe(groups as f64);
            most = most.max(groups as i64);
        }
        if most > self.metrics.groups_per_row_max.get() {
            self.metrics.groups_per_row_max.set(most);
        }
    }

    /// The shards as of the newest view.
    pub(crate) fn table(&self) -> Arc<Table> {
        let mut slot = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let view = self.view.borrow().clone();
        if !slot.0.as_ref().is_some_and(|known| Arc::ptr_eq(known, &view)) {
            let table = slot.1.renewed(&view, &self.config.fingerprint, self.shape.groups, &self.metrics);
            *slot = (Some(view), Arc::new(table));
        }
        slot.1.clone()
    }

    /// Told when the view changes.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.clone()
    }

    pub(crate) fn count_cell(&self, group: u32, pairs: u64) {
        if let Some(cell) = self.cells.get(group as usize) {
            cell.rows.fetch_add(pairs, Ordering::Relaxed);
            cell.counter.inc_by(pairs);
        }
    }

    pub(crate) fn take_hedge(&self) -> bool {
        self.hedges.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn earn_hedge(&self) {
        self.hedges.lock().unwrap_or_else(PoisonError::into_inner).earn(self.config.hedge_permille);
    }
}

#[async_trait]
impl MoeLink for Dispatcher {
    async fn moe(&self, input: MoeInput) -> Result<MoeOutput, Error> {
        Ok(self.call(input).await?)
    }

    async fn moe_published(&self, input: MoeInput, rows: Published) -> Result<MoeOutput, Error> {
        Ok(self.call_with(input, Some(rows)).await?)
    }
}
