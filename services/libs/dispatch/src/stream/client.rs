//! The side that calls.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use conclave_proto::v1::{Hello, PairGrant, Welcome};
use conclave_serve::same_host;
use tokio::net::UnixStream;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::frame::{self, Frame, Kind, Payloads};
use super::{HANDSHAKE, Receiver, Sender};

/// A ping goes out this often, idle or not.
const PING_EVERY: Duration = Duration::from_secs(2);
/// Without any word for this long after one, the other side is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Ends a connection when dropped.
pub(crate) type Ending = DropGuard;

/// Why there is no connection.
#[derive(Debug, PartialEq)]
pub(crate) enum OpenError {
    /// Nobody is there.
    Lost(String),
    /// Somebody else is there.
    Refused(String),
}

/// What comes over a connection.
pub(crate) enum Incoming<A> {
    Answer(A),
    /// The connection has ended, and why.
    Closed(String),
}

/// A connection with a member that is the one that was meant.
pub(crate) struct Opened {
    pub(crate) sender: Sender,
    pub(crate) ending: Ending,
    /// Its answer to an offer of a pair.
    pub(crate) pair: Option<PairGrant>,
}

/// Connects to a socket and says whom it means. From then on a task of this runtime calls `on` with what comes.
///
/// # Errors
/// When nobody answers there, or somebody else.
pub(crate) async fn open<A: Payloads + 'static>(
    socket: &str,
    hello: Hello,
    on: impl FnMut(Incoming<A>) + Send + 'static,
) -> Result<Opened, OpenError> {
    let lost = |reason: &dyn std::fmt::Display| OpenError::Lost(format!("socket {socket}: {reason}"));
    let connected = timeout(HANDSHAKE, async {
        let stream = Arc::new(UnixStream::connect(same_host::path(socket)).await?);
        let (sender, mut receiver) = (Sender::new(stream.clone()), Receiver::new(stream));
        sender.put(frame::encode(Kind::Hello, hello));
        sender.flush().await?;
        let answer = receiver.next().await?;
        Ok::<_, io::Error>((sender, receiver, answer))
    });
    let (sender, receiver, answer) = match connected.await {
        Ok(Ok(connected)) => connected,
        Ok(Err(error)) => return Err(lost(&error)),
        Err(_) => return Err(lost(&format!("no answer within {} ms", HANDSHAKE.as_millis()))),
    };
    let welcome = answer.filter(|frame| frame.kind == Kind::Welcome);
    let welcome = welcome.ok_or_else(|| lost(&"the connection ended without a welcome"))?;
    let Welcome { refused, pair } = frame::decode(welcome.message, welcome.payloads).map_err(|error| lost(&error))?;
    if !refused.is_empty() {
        return Err(OpenError::Refused(refused));
    }
    let end = CancellationToken::new();
    tokio::spawn(run(receiver, sender.clone(), end.clone(), on));
    Ok(Opened { sender, ending: end.drop_guard(), pair })
}

/// The task of a connection.
async fn run<A: Payloads>(
    mut receiver: Receiver,
    sender: Sender,
    end: CancellationToken,
    mut on: impl FnMut(Incoming<A>),
) {
    let reason = tokio::select! {
        reason = receive(&mut receiver, &sender, &mut on) => reason,
        () = end.cancelled() => "the link was given up".to_owned(),
    };
    sender.close();
    on(Incoming::Closed(reason));
}

/// Reads until the connection ends; the reason why it did.
async fn receive<A: Payloads>(receiver: &mut Receiver, sender: &Sender, on: &mut impl FnMut(Incoming<A>)) -> String {
    let mut pings = interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pinged: Option<Instant> = None;
    loop {
        tokio::select! {
            biased;
            frame = receiver.next() => {
                pinged = None;
                match frame {
                    Ok(Some(frame)) => match answer(frame, sender) {
                        Ok(Some(answer)) => on(Incoming::Answer(answer)),
                        Ok(None) => {}
                        Err(reason) => return reason,
                    },
                    Ok(None) => return "the other side ended the stream".to_owned(),
                    Err(error) => return reason(&error),
                }
            }
            Err(error) = sender.drain() => return reason(&error),
            _ = pings.tick() => {
                if pinged.is_some_and(|at| at.elapsed() >= PING_TIMEOUT) {
                    return format!("no word within {} ms after a ping", PING_TIMEOUT.as_millis());
                }
                pinged.get_or_insert_with(Instant::now);
                sender.put(frame::empty(Kind::Ping));
            }
        }
    }
}

/// The answer in a frame, if it is one.
fn answer<A: Payloads>(frame: Frame, sender: &Sender) -> Result<Option<A>, String> {
    match frame.kind {
        Kind::Message => frame::decode(frame.message, frame.payloads).map(Some),
        Kind::Ping => {
            sender.put(frame::empty(Kind::Pong));
            Ok(None)
        }
        Kind::Pong => Ok(None),
        Kind::Hello | Kind::Welcome => Err("a second handshake".to_owned()),
    }
}

fn reason(error: &io::Error) -> String {
    format!("the connection broke: {error}")
}
