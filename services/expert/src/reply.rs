//! The way of an answer back to who waits for it.

use std::time::{Duration, Instant};

use conclave_proto::v1::{ExpertBatch, ExpertResult, WorkId};
use tokio::sync::oneshot;

use crate::stream::StreamReply;

/// Where an answer goes.
pub(crate) enum Reply {
    /// To a task.
    Task(oneshot::Sender<ExpertResult>),
    /// Into the socket of a caller of this host, by the compute thread itself.
    Stream(StreamReply),
}

impl Reply {
    /// Whether anybody waits for it.
    pub(crate) fn is_wanted(&self) -> bool {
        match self {
            Self::Task(reply) => !reply.is_closed(),
            Self::Stream(reply) => reply.is_wanted(),
        }
    }

    pub(crate) fn send(self, result: ExpertResult) {
        match self {
            // The caller may have gone away meanwhile.
            Self::Task(reply) => drop(reply.send(result)),
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
    cancelled: bool,
}

impl Waiting {
    /// For `batch`, from now on.
    pub(crate) fn begin(batch: &ExpertBatch) -> Self {
        Self {
            id: batch.id,
            since: Instant::now(),
            signs: batch.signs_of_life,
            by_pair: !batch.board_rows.is_empty(),
            cancelled: false,
        }
    }

    /// Nobody waits for its sums any more. Whether it has to be answered all the same.
    pub(crate) fn cancel(&mut self) -> bool {
        self.cancelled = true;
        self.by_pair
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// What tells a caller that waits for longer than `every` that its work is not forgotten.
    pub(crate) fn sign(&self, every: Duration) -> Option<ExpertResult> {
        let due = self.signs && self.since.elapsed() >= every;
        due.then(|| ExpertResult { id: self.id, sign_of_life: true, ..ExpertResult::default() })
    }
}
