//! The way of an answer back to who waits for it.

use conclave_proto::v1::ExpertResult;
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
