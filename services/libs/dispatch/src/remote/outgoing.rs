//! The outgoing half of a link.

use tokio::sync::mpsc;

use crate::link::Transport;
use crate::stream::{Ending, Payloads, Sender};

/// Messages go to the task of a gRPC stream, or into a socket.
pub(super) enum Outgoing<M> {
    Grpc(mpsc::Sender<M>),
    /// The connection ends with the link.
    Stream(Sender, #[allow(dead_code, reason = "held")] Ending),
}

impl<M: Payloads> Outgoing<M> {
    /// False: the link is closed.
    pub(super) async fn send(&self, message: M) -> bool {
        match self {
            Self::Grpc(queue) => queue.send(message).await.is_ok(),
            Self::Stream(sender, _) => sender.send(message).await,
        }
    }

    /// Sends if that is possible at once.
    pub(super) fn try_send(&self, message: M) {
        match self {
            // With a full queue the other side works in vain, and its answer is dropped.
            Self::Grpc(queue) => drop(queue.try_send(message)),
            Self::Stream(sender, _) => drop(sender.post(message)),
        }
    }

    /// The socket's, where messages go into one.
    pub(super) fn connection(&self) -> Option<Sender> {
        match self {
            Self::Grpc(_) => None,
            Self::Stream(sender, _) => Some(sender.clone()),
        }
    }

    pub(super) fn transport(&self) -> Transport {
        match self {
            Self::Grpc(_) => Transport::Tcp,
            Self::Stream(..) => Transport::SameHost,
        }
    }
}
