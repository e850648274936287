//! One layer call: places the groups, sends the pieces, and places them again where a shard fails, refuses or hangs.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use conclave_kernels::Published;
use conclave_proto::{CellId, InstanceId};
use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use tokio::time::{Instant, sleep, timeout_at};

use crate::attempt::Failure;
use crate::combine::Part;
use crate::dispatcher::Dispatcher;
use crate::error::MoeError;
use crate::gate::Choices;
use crate::input::LayerInput;
use crate::plan::{self, Demand};
use crate::shards::Shard;
use crate::work;

/// Pause before all replicas of a cell are tried once more; doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A layer call under way.
pub(crate) struct Call<'a> {
    pub(crate) dispatcher: &'a Dispatcher,
    pub(crate) input: LayerInput,
    pub(crate) choices: Choices,
    pub(crate) idle: Vec<u32>,
    /// The rows are on the board of this process's device.
    pub(crate) published: Option<Published>,
    pub(crate) deadline: Instant,
    budget: Duration,
    pub(crate) next_part: AtomicU32,
    pub(crate) mixed: AtomicBool,
    pub(crate) took_part: Mutex<BTreeSet<InstanceId>>,
    /// Set while the call waits for a cell without a usable replica.
    blocked: Mutex<Option<Blocked>>,
}

/// A cell without a usable replica.
struct Blocked {
    cell: CellId,
    since: Instant,
    last: String,
}

impl Blocked {
    /// How the wait ends if it ends now.
    fn over(&self) -> MoeError {
        let (cell, waited_ms, last) = (self.cell, self.since.elapsed().as_millis(), self.last.clone());
        MoeError::NoReplica { cell, waited_ms, last }
    }
}

/// Some groups over some rows, on one shard.
pub(crate) struct Piece {
    pub(crate) shard: Arc<Shard>,
    pub(crate) groups: Vec<u32>,
    pub(crate) span: Range<usize>,
}

/// What has been tried for a piece of work, and what to do when nothing is left to try.
#[derive(Clone)]
pub(crate) struct Tries {
    pub(crate) tried: Vec<InstanceId>,
    pub(crate) attempt: u32,
    /// Wait for a replica; otherwise give up (somebody else is still working on it).
    pub(crate) patient: bool,
    pub(crate) failing_since: Option<Instant>,
    pub(crate) last: String,
    pub(crate) pause: Duration,
}

impl Tries {
    fn first() -> Self {
        let last = "none is registered".to_owned();
        Self { tried: Vec::new(), attempt: 0, patient: true, failing_since: None, last, pause: SHORTEST_PAUSE }
    }

    fn failed(&mut self, shard: &Shard, failure: &Failure) {
        self.tried.push(shard.instance().clone());
        self.attempt += 1;
        self.failing_since.get_or_insert_with(Instant::now);
        self.last = failure.message.clone();
    }
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        dispatcher: &'a Dispatcher,
        input: LayerInput,
        choices: Choices,
        deadline: Instant,
        budget: Duration,
    ) -> Self {
        let wanted = work::demand(&dispatcher.shape, &choices, &(0..input.rows));
        let busy = |g: &u32| wanted.iter().any(|want| want.group == *g);
        Self {
            idle: (0..dispatcher.shape.groups as u32).filter(|g| !busy(g)).collect(),
            dispatcher,
            input,
            choices,
            published: None,
            deadline,
            budget,
            next_part: AtomicU32::new(0),
            mixed: AtomicBool::new(false),
            took_part: Mutex::default(),
            blocked: Mutex::default(),
        }
    }

    /// The partial sums of all chosen experts.
    pub(crate) async fn run(&self) -> Result<Vec<Part>, MoeError> {
        let span = 0..self.input.rows;
        let groups = self.demand(&span, None).iter().map(|want| want.group).collect();
        match timeout_at(self.deadline, self.solve(groups, span, None, Tries::first())).await {
            Ok(result) => result,
            Err(_) => Err(self.blocked().as_ref().map_or_else(|| self.expired(), Blocked::over)),
        }
    }

    /// Shards that have done part of the work.
    pub(crate) fn shards(&self) -> u32 {
        self.took_part.lock().unwrap_or_else(PoisonError::into_inner).len() as u32
    }

    /// Whether some rows ran on a member with another numerics id than the preferred one.
    pub(crate) fn mixed(&self) -> bool {
        self.mixed.load(Ordering::Relaxed)
    }

    fn blocked(&self) -> std::sync::MutexGuard<'_, Option<Blocked>> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expired(&self) -> MoeError {
        MoeError::Expired { layer: self.input.layer, budget_ms: self.budget.as_millis() }
    }

    fn demand(&self, span: &Range<usize>, groups: Option<&[u32]>) -> Vec<Demand> {
        let mut demand = work::demand(&self.dispatcher.shape, &self.choices, span);
        demand.retain(|want| groups.is_none_or(|groups| groups.contains(&want.group)));
        demand
    }

    /// Does `groups` over the rows in `span`: on `shard` if given, else wherever it is planned, until it is done.
    fn solve<'s>(
        &'s self,
        groups: Vec<u32>,
        span: Range<usize>,
        mut shard: Option<Arc<Shard>>,
        mut tries: Tries,
    ) -> BoxFuture<'s, Result<Vec<Part>, MoeError>> {
        async move {
            loop {
                let piece = match shard.take() {
                    Some(shard) => Piece { shard, groups: groups.clone(), span: span.clone() },
                    None => {
                        let mut pieces = self.place(&groups, &span, &mut tries).await?;
                        match pieces.pop() {
                            Some(last) if pieces.is_empty() => last,
                            Some(last) => {
                                pieces.push(last);
                                return self.solve_all(pieces, &tries).await;
                            }
                            None => return Ok(Vec::new()),
                        }
                    }
                };
                match self.attempt(&piece, &tries).await {
                    Ok(parts) => return Ok(parts),
                    Err(failure) => self.failed(&piece, &failure, &mut tries)?,
                }
            }
        }
        .boxed()
    }

    pub(crate) async fn solve_all(&self, pieces: Vec<Piece>, tries: &Tries) -> Result<Vec<Part>, MoeError> {
        let each = pieces.into_iter().map(|p| self.solve(p.groups, p.span, Some(p.shard), tries.clone()));
        Ok(try_join_all(each).await?.concat())
    }

    /// Notes a failure. An error where trying again cannot help.
    fn failed(&self, piece: &Piece, failure: &Failure, tries: &mut Tries) -> Result<(), MoeError> {
        let dispatcher = self.dispatcher;
        piece.shard.fail(failure.trouble, &dispatcher.connector, dispatcher.config.connect_timeout);
        dispatcher.metrics.retries.with_label_values(&[failure.trouble.name()]).inc();
        tries.failed(&piece.shard, failure);
        if failure.invalid && self.place_now(&piece.groups, &piece.span, &tries.tried).is_err() {
            return Err(MoeError::Internal(failure.message.clone()));
        }
        Ok(())
    }

    /// Plans, and waits for a replica where there is none.
    async fn place(&self, groups: &[u32], span: &Range<usize>, tries: &mut Tries) -> Result<Vec<Piece>, MoeError> {
        let mut changes = self.dispatcher.changes();
        loop {
            changes.mark_unchanged();
            let group = match self.place_now(groups, span, &tries.tried) {
                Ok(pieces) => {
                    *self.blocked() = None;
                    return Ok(pieces);
                }
                Err(group) => group,
            };
            let since = *tries.failing_since.get_or_insert_with(Instant::now);
            let blocked = Blocked { cell: self.dispatcher.shape.cell(group), since, last: tries.last.clone() };
            if !tries.patient || since.elapsed() >= self.dispatcher.config.no_replica_timeout {
                return Err(blocked.over());
            }
            *self.blocked() = Some(blocked);
            self.dispatcher.metrics.no_replica_waits.inc();
            tokio::select! {
                _ = changes.changed() => {}
                () = sleep(tries.pause) => {}
            }
            tries.pause = (tries.pause * 2).min(LONGEST_PAUSE);
            tries.tried.clear();
        }
    }

    /// Plans with the shards as they are. The error is a group that nobody can take.
    pub(crate) fn place_now(
        &self,
        groups: &[u32],
        span: &Range<usize>,
        tried: &[InstanceId],
    ) -> Result<Vec<Piece>, u32> {
        let dispatcher = self.dispatcher;
        let table = dispatcher.table();
        let now = Instant::now();
        let preferred = dispatcher.config.numerics.as_deref().unwrap_or(&table.numerics);
        let candidates: Vec<_> =
            table.shards.iter().map(|s| s.candidate(preferred, tried.contains(s.instance()), now)).collect();
        let mut last = dispatcher.last.lock().unwrap_or_else(PoisonError::into_inner);
        let at = |id: &Option<InstanceId>| {
            id.as_ref().and_then(|id| table.shards.binary_search_by(|s| s.instance().cmp(id)).ok())
        };
        let shares =
            plan::assign(&self.demand(span, Some(groups)), &candidates, &last.iter().map(at).collect::<Vec<_>>())?;
        let mut pieces = Vec::with_capacity(shares.len());
        for share in shares {
            let shard = &table.shards[share.shard];
            for &group in &share.groups {
                last[group as usize] = Some(shard.instance().clone());
            }
            let limit = dispatcher.config.rows_per_message;
            for span in work::spans(&dispatcher.shape, &self.choices, &share.groups, span, limit) {
                pieces.push(Piece { shard: shard.clone(), groups: share.groups.clone(), span });
            }
        }
        Ok(pieces)
    }
}
