//! The way of an answer back to who waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use conclave_proto::v1::{ExpertBatch, ExpertResult, WorkId};
use tokio::sync::oneshot;

use crate::stream::StreamReply;

/// Set once nobody waits for the sums any more, but for an answer.
pub(crate) type Cancelled = Arc<AtomicBool>;

/// Where an answer goes.
pub(crate) enum Reply {
    /// To a task.
    Task(oneshot::Sender<ExpertResult>, Cancelled),
    /// Into the socket of a caller of this host, by the compute thread itself.
    Stream(StreamReply),
}

impl Reply {
    /// Whether anybody waits for it.
    pub(crate) fn is_wanted(&self) -> bool {
        match self {
            Self::Task(reply, cancelled) => !reply.is_closed() && !cancelled.load(Ordering::Acquire),
            Self::Stream(reply) => reply.is_wanted(),
        }
    }

    pub(crate) fn send(self, result: ExpertResult) {
        match self {
            // The caller may have gone away meanwhile.
            Self::Task(reply, _) => drop(reply.send(result)),
            Self::Stream(reply) => reply.send(result),
        }
    }
}

/// A batch that somebody waits for.
pub(crate) struct Waiting {
    id: Option<WorkId>,
    since: Instant,
    /// The caller wants to be told while it waits.
    signs: bool,
    /// Its turn of a pair ends with its answer.
    by_pair: bool,
    cancelled: Cancelled,
}

impl Waiting {
    /// For `batch`, from now on.
    pub(crate) fn begin(batch: &ExpertBatch) -> Self {
        Self {
            id: batch.id,
            since: Instant::now(),
            signs: batch.signs_of_life,
            by_pair: !batch.board_rows.is_empty(),
            cancelled: Cancelled::default(),
        }
    }

    /// Nobody waits for its sums any more. Whether it has to be answered all the same.
    pub(crate) fn cancel(&self) -> bool {
        self.cancelled.store(true, Ordering::Release);
        self.by_pair
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Set when it is cancelled.
    pub(crate) fn cancelled(&self) -> Cancelled {
        self.cancelled.clone()
    }

    /// What tells a caller that waits for longer than `every` that its work is not forgotten.
    pub(crate) fn sign(&self, every: Duration) -> Option<ExpertResult> {
        let due = self.signs && self.since.elapsed() >= every;
        due.then(|| ExpertResult { id: self.id, sign_of_life: true, ..ExpertResult::default() })
    }
}
