//! One piece of a layer call on its shard: sent, hedged where the shard is slow, given up where it hangs.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use conclave_proto::v1::{ExpertBatch, ExpertResult, WorkErrorKind, WorkId};
use conclave_serve::telemetry;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::{pin_mut, poll};
use tokio::time::{Instant, sleep_until};

use crate::answer;
use crate::call::{Call, Piece, Tries};
use crate::combine::Part;
use crate::condition::Trouble;
use crate::error::MoeError;
use crate::link::{LinkError, ShardLink};
use crate::metrics::MESSAGES;
use crate::pair::Turn;
use crate::predict::{Patience, units};
use crate::shards::Shard;
use crate::work::{self, ExpectedSum, Work};

/// How often a replacement is looked for while a shard hangs.
const HANG_CHECK: Duration = Duration::from_millis(250);

/// Why one shard did not do its piece.
pub(crate) struct Failure {
    pub(crate) trouble: Trouble,
    /// The shard says that the batch itself is wrong.
    pub(crate) invalid: bool,
    pub(crate) message: String,
}

/// Over which link a batch went last, once it did.
#[derive(Default)]
struct Sent(Mutex<Option<(Arc<dyn ShardLink>, WorkId)>>);

impl Sent {
    fn over(&self, link: &Arc<dyn ShardLink>, id: WorkId) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((link.clone(), id));
    }

    fn last_sign(&self) -> Option<Instant> {
        let sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sent.as_ref().and_then(|(link, id)| link.last_sign(*id))
    }
}

/// What a shard was asked, and its answer.
struct Asked {
    id: WorkId,
    expected: Vec<ExpectedSum>,
    result: ExpertResult,
}

/// A shard that showed signs of life does not hang: when to look again.
fn alive_until(sign: Option<Instant>, patience: Duration, now: Instant) -> Option<Instant> {
    sign.map(|sign| sign + patience).filter(|until| *until > now)
}

impl Call<'_> {
    /// One piece on its shard; on a second one beside it where the first is slow or hangs.
    pub(crate) async fn attempt(&self, piece: &Piece, tries: &Tries) -> Result<Vec<Part>, Failure> {
        let dispatcher = self.dispatcher;
        let held = |g: &&u32| piece.shard.holds(**g);
        let idle: Vec<u32> = self.idle.iter().filter(held).copied().collect();
        let work = work::build(&dispatcher.shape, &self.choices, &piece.groups, &idle, &piece.span);
        let bytes = work.rows.len() * dispatcher.shape.hidden * self.input.activation.size();
        let units = units(work.pairs(), work.experts.len(), bytes);
        let patience = Patience::new(&dispatcher.config, piece.shard.predict(units));
        dispatcher.earn_hedge();

        let started = Instant::now();
        let sent = Sent::default();
        let primary = self.send(&piece.shard, &work, units, tries.attempt, &sent);
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
                    if let Some(later) = alive_until(sent.last_sign(), dispatcher.config.hang_floor, hang_at) {
                        hang_at = later;
                        continue;
                    }
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
    async fn send(
        &self,
        shard: &Arc<Shard>,
        work: &Work,
        units: f64,
        attempt: u32,
        sent: &Sent,
    ) -> Result<Vec<Part>, Failure> {
        let dispatcher = self.dispatcher;
        let lost = |error: LinkError| Failure::new(Trouble::Lost, error.to_string());
        let _outstanding = shard.begin(work.pairs());
        let link = shard.link(dispatcher.connector.as_ref(), dispatcher.config.connect_timeout).await.map_err(lost)?;
        self.count(shard, work);
        let started = Instant::now();
        let by_pair = self.published.as_ref().and_then(|_| link.pair().ok()?.turn());
        let Asked { id, expected, result } = match self.ask(&link, work, attempt, by_pair, sent).await {
            // Its rows are here: they go in a message.
            Err(error @ LinkError::Pair { .. }) => {
                tracing::warn!(%error, "rows and sums go in messages from now on");
                self.ask(&link, work, attempt, None, sent).await
            }
            asked => asked,
        }
        .map_err(lost)?;
        if result.id != Some(id) {
            return Err(Failure::new(Trouble::Wrong, format!("shard {}: answer to another batch", shard.instance())));
        }
        if let Some(error) = &result.error {
            return Err(Failure::of(error.kind(), format!("shard {}: {}", shard.instance(), error.message)));
        }
        answer::check(work, &expected, dispatcher.shape.hidden, self.input.activation, &result)
            .map_err(|message| Failure::new(Trouble::Wrong, format!("shard {}: {message}", shard.instance())))?;
        shard.succeed(units, started.elapsed(), result.queued_rows);
        self.took_part.lock().unwrap_or_else(PoisonError::into_inner).insert(shard.instance().clone());
        Ok(parts(work, expected, result))
    }

    /// Sends one batch over a link, in a turn of its pair or in a message, and waits for the answer.
    async fn ask(
        &self,
        link: &Arc<dyn ShardLink>,
        work: &Work,
        attempt: u32,
        turn: Option<Turn>,
        sent: &Sent,
    ) -> Result<Asked, LinkError> {
        let (shape, input) = (&self.dispatcher.shape, &self.input);
        let id = WorkId {
            caller: input.caller,
            step: input.step,
            layer: input.layer,
            attempt: (input.attempt << 16) | (attempt & 0xffff),
            part: self.next_part.fetch_add(1, Ordering::Relaxed),
        };
        let left = self.deadline.saturating_duration_since(Instant::now());
        let (budget_us, traceparent) = ((left.as_micros() as u64).max(1), telemetry::traceparent());
        sent.over(link, id);
        let way = turn.as_ref().map_or(MESSAGES, |turn| turn.way().name());
        self.dispatcher.metrics.batches.with_label_values(&[way]).inc();
        let computing = match turn {
            Some(turn) => {
                let batch = work.batch_of_board(shape, input, id, budget_us);
                link.compute_by_pair(ExpertBatch { traceparent, ..batch }, turn)
            }
            None => link.compute(ExpertBatch { traceparent, ..work.batch(shape, input, id, budget_us) }),
        };
        pin_mut!(computing);
        let answered = poll!(&mut computing);
        // Meanwhile.
        let expected = work.expected(shape);
        let result = match answered {
            Poll::Ready(result) => result,
            Poll::Pending => computing.await,
        }?;
        Ok(Asked { id, expected, result })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_of_life_counts_for_a_while() {
        let (now, patience) = (Instant::now(), Duration::from_secs(1));
        assert_eq!(alive_until(None, patience, now), None);
        let sign = now - Duration::from_millis(300);
        assert_eq!(alive_until(Some(sign), patience, now), Some(now + Duration::from_millis(700)));
        assert_eq!(alive_until(Some(now - patience), patience, now), None, "it has stopped giving any");
    }
}
