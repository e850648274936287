//! The answers of a link, on their way to who waits for them.

use std::hash::Hash;
use std::sync::Arc;

use conclave_proto::v1::{Hello, PairGrant};
use tonic::Streaming;

use super::outgoing::Outgoing;
use super::pending::Pending;
use crate::stream::{self, Incoming, OpenError, Opened, Payloads};

/// Hands one message over to its waiter.
pub(super) type Settle<K, A> = fn(&Pending<K, A>, A);

/// Hands over what comes in a gRPC stream, until it ends; `peer` is who ended it then.
pub(super) async fn demultiplex<K, A>(
    mut answers: Streaming<A>,
    peer: &'static str,
    pending: Arc<Pending<K, A>>,
    settle: Settle<K, A>,
) where
    K: Hash + Eq + Copy,
{
    let reason = loop {
        match answers.message().await {
            Ok(Some(answer)) => settle(&pending, answer),
            Ok(None) => break format!("{peer} ended the stream"),
            Err(status) => break status.message().to_owned(),
        }
    };
    pending.close(reason);
}

/// Connects to the socket of a member of this host; what comes over it is handed over. With its answer to an offer of a pair.
///
/// # Errors
/// When nobody answers there, or somebody else.
pub(super) async fn open<K, A, M>(
    socket: &str,
    hello: Hello,
    pending: Arc<Pending<K, A>>,
    settle: Settle<K, A>,
) -> Result<(Outgoing<M>, Option<PairGrant>), OpenError>
where
    K: Hash + Eq + Copy + Send + 'static,
    A: Payloads + 'static,
{
    let on = move |incoming| match incoming {
        Incoming::Answer(answer) => settle(&pending, answer),
        Incoming::Closed(reason) => pending.close(reason),
    };
    let Opened { sender, ending, pair } = stream::open(socket, hello, on).await?;
    Ok((Outgoing::Stream(sender, ending), pair))
}
