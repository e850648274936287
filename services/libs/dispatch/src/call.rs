//! One layer call: places the groups, sends the batches, and sends them again where a shard fails, refuses or hangs.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use conclave_proto::InstanceId;
use conclave_proto::v1::{ExpertResult, WorkErrorKind, WorkId};
use conclave_serve::telemetry;
use futures::future::{BoxFuture, try_join_all};
use futures::{FutureExt, pin_mut};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::answer;
use crate::combine::Part;
use crate::condition::Trouble;
use crate::dispatcher::Dispatcher;
use crate::error::MoeError;
use crate::gate::Choices;
use crate::input::LayerInput;
use crate::plan::{self, Demand};
use crate::predict::{Patience, units};
use crate::shards::Shard;
use crate::work::{self, ExpectedSum, Work};

/// Pause before all replicas of a cell are tried once more; doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// How often a replacement is looked for while a shard hangs.
const HANG_CHECK: Duration = Duration::from_millis(250);

/// A layer call under way.
pub(crate) struct Call<'a> {
    dispatcher: &'a Dispatcher,
    pub(crate) input: LayerInput,
    choices: Choices,
    idle: Vec<u32>,
    deadline: Instant,
    budget: Duration,
    next_part: AtomicU32,
    mixed: AtomicBool,
    took_part: Mutex<BTreeSet<InstanceId>>,
    /// Set while the call waits for a cell without a usable replica.
    blocked: Mutex<Option<MoeError>>,
}

/// Some groups over some rows, on one shard.
struct Piece {
    shard: Arc<Shard>,
    groups: Vec<u32>,
    span: Range<usize>,
}

/// What has been tried for a piece of work, and what to do when nothing is left to try.
#[derive(Clone)]
struct Tries {
    tried: Vec<InstanceId>,
    attempt: u32,
    /// Wait for a replica; otherwise give up (somebody else is still working on it).
    patient: bool,
    failing_since: Option<Instant>,
    last: String,
    pause: Duration,
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

/// Why one shard did not do its piece.
struct Failure {
    trouble: Trouble,
    /// The shard says that the batch itself is wrong.
    invalid: bool,
    message: String,
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
            Err(_) => Err(self.blocked().clone().unwrap_or_else(|| self.expired())),
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

    fn blocked(&self) -> std::sync::MutexGuard<'_, Option<MoeError>> {
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

    async fn solve_all(&self, pieces: Vec<Piece>, tries: &Tries) -> Result<Vec<Part>, MoeError> {
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
            let cell = self.dispatcher.shape.cell(group);
            let error = MoeError::NoReplica { cell, waited_ms: since.elapsed().as_millis(), last: tries.last.clone() };
            if !tries.patient || since.elapsed() >= self.dispatcher.config.no_replica_timeout {
                return Err(error);
            }
            *self.blocked() = Some(error);
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
    fn place_now(&self, groups: &[u32], span: &Range<usize>, tried: &[InstanceId]) -> Result<Vec<Piece>, u32> {
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

    /// One piece on its shard; on a second one beside it where the first is slow or hangs.
    async fn attempt(&self, piece: &Piece, tries: &Tries) -> Result<Vec<Part>, Failure> {
        let dispatcher = self.dispatcher;
        let held = |g: &&u32| piece.shard.holds(**g);
        let idle: Vec<u32> = self.idle.iter().filter(held).copied().collect();
        let work = work::build(&dispatcher.shape, &self.choices, &piece.groups, &idle, &piece.span);
        let bytes = work.rows.len() * dispatcher.shape.hidden * self.input.activation.size();
        let units = units(work.pairs(), work.experts.len(), bytes);
        let patience = Patience::new(&dispatcher.config, piece.shard.predict(units));
        dispatcher.earn_hedge();

        let started = Instant::now();
        let primary = self.send(&piece.shard, &work, units, tries.attempt);
        pin_mut!(primary);
        let mut backup: Option<BoxFuture<'_, Result<Vec<Part>, MoeError>>> = None;
        let mut hedge_at = patience.hedge.map(|after| started + after);
        let mut hang_at = started + patience.hang;
        let mut hung = false;
        loop {
            tokio::select! {
                result = &mut primary => match (result, backup.take()) {
                    (Err(failure), Some(backup)) => return backup.await.map_err(|_| failure),
                    (result, _) => return result,
                },
                result = async { backup.as_mut().expect("guarded").await }, if backup.is_some() => match result {
                    Ok(parts) => return Ok(parts),
                    Err(_) => backup = None,
                },
                () = sleep_until(hedge_at.unwrap_or(hang_at)), if hedge_at.is_some() => {
                    hedge_at = None;
                    backup = self.backup(piece, tries, || dispatcher.take_hedge());
                    if backup.is_some() {
                        dispatcher.metrics.hedges.inc();
                    }
                }
                () = sleep_until(hang_at) => {
                    hang_at += HANG_CHECK;
                    if !hung {
                        piece.shard.fail(Trouble::Hung, &dispatcher.connector, dispatcher.config.connect_timeout);
                        dispatcher.metrics.retries.with_label_values(&[Trouble::Hung.name()]).inc();
                        hung = true;
                    }
                    if backup.is_none() {
                        backup = self.backup(piece, tries, || true);
                    }
                }
            }
        }
    }

    /// The same piece elsewhere, if anybody else can take it at once and `allowed` says so.
    fn backup<'s>(
        &'s self,
        piece: &Piece,
        tries: &Tries,
        allowed: impl FnOnce() -> bool,
    ) -> Option<BoxFuture<'s, Result<Vec<Part>, MoeError>>> {
        let mut tries = Tries { patient: false, attempt: tries.attempt + 1, ..tries.clone() };
        tries.tried.push(piece.shard.instance().clone());
        let pieces = self.place_now(&piece.groups, &piece.span, &tries.tried).ok()?;
        if !allowed() {
            return None;
        }
        Some(async move { self.solve_all(pieces, &tries).await }.boxed())
    }

    /// Sends one batch and checks the answer.
    async fn send(&self, shard: &Arc<Shard>, work: &Work, units: f64, attempt: u32) -> Result<Vec<Part>, Failure> {
        let dispatcher = self.dispatcher;
        let lost = |error: crate::LinkError| Failure::new(Trouble::Lost, error.to_string());
        let _outstanding = shard.begin(work.pairs());
        let link = shard.link(dispatcher.connector.as_ref(), dispatcher.config.connect_timeout).await.map_err(lost)?;
        let id = WorkId {
            caller: self.input.caller,
            step: self.input.step,
            layer: self.input.layer,
            attempt: (self.input.attempt << 16) | (attempt & 0xffff),
            part: self.next_part.fetch_add(1, Ordering::Relaxed),
        };
        let left = self.deadline.saturating_duration_since(Instant::now());
        let mut batch = work.batch(&dispatcher.shape, &self.input, id, (left.as_micros() as u64).max(1));
        batch.traceparent = telemetry::traceparent();
        self.count(shard, work);
        let started = Instant::now();
        let result = link.compute(batch).await.map_err(lost)?;
        if result.id != Some(id) {
            return Err(Failure::new(Trouble::Wrong, format!("shard {}: answer to another batch", shard.instance())));
        }
        if let Some(error) = &result.error {
            return Err(Failure::of(error.kind(), format!("shard {}: {}", shard.instance(), error.message)));
        }
        let expected = work.expected(&dispatcher.shape);
        answer::check(work, &expected, dispatcher.shape.hidden, self.input.activation, &result)
            .map_err(|message| Failure::new(Trouble::Wrong, format!("shard {}: {message}", shard.instance())))?;
        shard.succeed(units, started.elapsed(), result.queued_rows);
        self.took_part.lock().unwrap_or_else(PoisonError::into_inner).insert(shard.instance().clone());
        Ok(parts(work, expected, result))
    }

    fn count(&self, shard: &Shard, work: &Work) {
        let dispatcher = self.dispatcher;
        shard.rows.inc_by(work.rows.len() as u64);
        for (expert, count) in work.experts.iter().zip(&work.counts) {
            dispatcher.count_cell(dispatcher.shape.group_of(*expert), u64::from(*count));
        }
        let table = dispatcher.table();
        let preferred = dispatcher.config.numerics.as_deref().unwrap_or(&table.numerics);
        if shard.member.numerics != preferred {
            self.mixed.store(true, Ordering::Relaxed);
        }
    }
}

impl Failure {
    fn new(trouble: Trouble, message: String) -> Self {
        Self { trouble, invalid: false, message }
    }

    fn of(kind: WorkErrorKind, message: String) -> Self {
        let trouble = match kind {
            WorkErrorKind::Overloaded | WorkErrorKind::Expired => Trouble::Busy,
            WorkErrorKind::Leaving | WorkErrorKind::NotHeld => Trouble::Leaving,
            WorkErrorKind::Invalid | WorkErrorKind::Internal | WorkErrorKind::Unspecified => Trouble::Wrong,
        };
        Self { trouble, invalid: kind == WorkErrorKind::Invalid, message }
    }
}

/// The sums of an answer, with the layer's own row numbers.
fn parts(work: &Work, expected: Vec<ExpectedSum>, result: ExpertResult) -> Vec<Part> {
    let sums = result.sums.into_iter().zip(expected);
    sums.map(|(sum, want)| Part {
        node: want.node,
        rows: want.rows.iter().map(|row| work.rows[*row as usize]).collect(),
        sum: sum.sum,
    })
    .collect()
}
