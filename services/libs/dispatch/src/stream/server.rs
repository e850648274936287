//! The side that is called.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use conclave_proto::v1::{Hello, PairGrant, PairOffer, Welcome};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::frame::{self, Kind, Payloads};
use super::{HANDSHAKE, Receiver, Sender};

/// Pause after the operating system refused a connection, for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Who is welcome.
#[derive(Debug, Clone)]
pub struct Welcoming {
    /// `expert` or `dispatch`.
    pub service: &'static str,
    /// Id of this member; `None`: whoever it is.
    pub instance: Option<String>,
    /// Of its checkpoint.
    pub fingerprint: String,
}

impl Welcoming {
    /// Why a caller is not welcome; empty where it is.
    fn refusal(&self, hello: &Hello) -> String {
        let wrong = |what: &str, found: &str, expected: &str| format!("{what}: found {found:?}, expected {expected:?}");
        if hello.service != self.service {
            return wrong("service", &hello.service, self.service);
        }
        if let Some(instance) = self.instance.as_ref().filter(|instance| **instance != hello.instance) {
            return wrong(conclave_proto::INSTANCE_HEADER, &hello.instance, instance);
        }
        if hello.fingerprint != self.fingerprint {
            return wrong(conclave_proto::FINGERPRINT_HEADER, &hello.fingerprint, &self.fingerprint);
        }
        String::new()
    }
}

/// A caller that was welcomed.
#[derive(Debug)]
pub struct Caller {
    /// To answer.
    pub sender: Sender,
    receiver: Receiver,
}

/// What comes from a caller.
#[derive(Debug)]
pub enum Event<M> {
    /// A message.
    Message(M),
    /// It has closed the connection, or its process has ended.
    Gone,
    /// It talks nonsense.
    Nonsense,
}

impl Caller {
    /// The next message, if `take`; otherwise, and meanwhile, answers are written. While the caller leaves many unread,
    /// none of its messages is read. Cancel-safe.
    pub async fn next<M: Payloads>(&mut self, take: bool) -> Event<M> {
        loop {
            if self.sender.make_room().await.is_err() {
                return Event::Gone;
            }
            let frame = tokio::select! {
                biased;
                frame = self.receiver.next(), if take => frame,
                Err(_) = self.sender.drain() => return Event::Gone,
            };
            match frame {
                Ok(Some(frame)) if frame.kind == Kind::Message => match frame::decode(frame.message, frame.payloads) {
                    Ok(message) => return Event::Message(message),
                    Err(error) => return self.ended(&error, Event::Nonsense),
                },
                Ok(Some(frame)) if frame.kind == Kind::Ping => drop(self.sender.put(frame::empty(Kind::Pong))),
                Ok(Some(frame)) if frame.kind == Kind::Pong => {}
                Ok(Some(_)) => return self.ended(&"a second handshake", Event::Nonsense),
                Ok(None) => return Event::Gone,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return self.ended(&error, Event::Nonsense),
                Err(error) => return self.ended(&error, Event::Gone),
            }
        }
    }

    fn ended<M>(&self, reason: &dyn std::fmt::Display, event: Event<M>) -> Event<M> {
        tracing::debug!(%reason, "stream of a member of this host ended");
        event
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.sender.close();
    }
}

/// Accepts callers until `stop`, and waits until those that came have ended. `talk` has to end soon after `stop`. `grant`
/// answers offers of a pair; what it keeps of one goes to `talk`.
pub async fn serve<P, F>(
    listener: UnixListener,
    welcoming: Welcoming,
    stop: CancellationToken,
    grant: impl Fn(&PairOffer) -> (PairGrant, Option<P>) + Clone + Send + 'static,
    talk: impl Fn(Caller, Option<P>) -> F + Clone + Send + 'static,
) where
    P: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut callers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (welcoming, grant, talk) = (welcoming.clone(), grant.clone(), talk.clone());
                    callers.spawn(async move {
                        match timeout(HANDSHAKE, welcome(stream, &welcoming, grant)).await {
                            Ok(Ok(Some((caller, pair)))) => talk(caller, pair).await,
                            Ok(Ok(None)) | Err(_) => {}
                            Ok(Err(error)) => tracing::debug!(%error, "handshake with a member of this host"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a member of this host could not connect");
                    sleep(PAUSE).await;
                }
            },
            Some(_) = callers.join_next() => {}
            () = stop.cancelled() => break,
        }
    }
    drop(listener);
    while callers.join_next().await.is_some() {}
}

/// Grants no pair: this service has no device.
pub(crate) fn without_pairs(_: &PairOffer) -> (PairGrant, Option<()>) {
    (PairGrant { refused: "it has no device".to_owned(), ..PairGrant::default() }, None)
}

/// The handshake.
async fn welcome<P>(
    stream: UnixStream,
    welcoming: &Welcoming,
    grant: impl Fn(&PairOffer) -> (PairGrant, Option<P>),
) -> io::Result<Option<(Caller, Option<P>)>> {
    let stream = Arc::new(stream);
    let (sender, mut receiver) = (Sender::new(stream.clone()), Receiver::new(stream));
    let Some(frame) = receiver.next().await?.filter(|frame| frame.kind == Kind::Hello) else { return Ok(None) };
    let hello: Hello = frame::decode(frame.message, frame.payloads).map_err(io::Error::other)?;
    let refused = welcoming.refusal(&hello);
    let welcome = refused.is_empty();
    let (pair, kept) = hello.pair.as_ref().filter(|_| welcome).map(grant).unzip();
    sender.put(frame::encode(Kind::Welcome, Welcome { refused, pair }));
    sender.flush().await?;
    Ok(welcome.then_some((Caller { sender, receiver }, kept.flatten())))
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::{ExpertBatch, ExpertResult, WorkId};
    use conclave_serve::same_host;
    use tokio::sync::mpsc;

    use super::super::client::{Incoming, OpenError, Opened, open};
    use super::*;

    fn hello(instance: &str, fingerprint: &str) -> Hello {
        Hello { service: "expert".into(), instance: instance.into(), fingerprint: fingerprint.into(), pair: None }
    }

    /// Answers each batch with its id.
    async fn echo(mut caller: Caller, _: Option<()>) {
        while let Event::Message::<ExpertBatch>(batch) = caller.next(true).await {
            let sums = vec![conclave_proto::v1::PartialSum { sum: batch.x, ..Default::default() }];
            caller.sender.post(ExpertResult { id: batch.id, sums, ..ExpertResult::default() });
        }
    }

    fn start() -> (String, CancellationToken) {
        let (listener, name) = same_host::listen("a").unwrap();
        let welcoming = Welcoming { service: "expert", instance: Some("a".into()), fingerprint: "f".into() };
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, welcoming, stop.clone(), without_pairs, echo));
        (name, stop)
    }

    #[tokio::test]
    async fn only_who_means_this_member_and_its_checkpoint_is_welcome() {
        let (socket, _stop) = start();
        for (instance, fingerprint, refused) in [
            ("b", "f", "conclave-instance: found \"b\", expected \"a\""),
            ("a", "g", "conclave-fingerprint: found \"g\", expected \"f\""),
        ] {
            let opened = open::<ExpertResult>(&socket, hello(instance, fingerprint), |_| {}).await;
            assert_eq!(opened.err(), Some(OpenError::Refused(refused.to_owned())));
        }
        let nobody = open::<ExpertResult>("nobody", hello("a", "f"), |_| {}).await.err();
        assert!(matches!(nobody, Some(OpenError::Lost(reason)) if reason.contains("nobody: ")));
    }

    #[tokio::test]
    async fn messages_of_any_size_come_back_in_order_and_the_end_is_told() {
        let (socket, stop) = start();
        let (told, mut incoming) = mpsc::unbounded_channel();
        let opened = open::<ExpertResult>(&socket, hello("a", "f"), move |incoming| drop(told.send(incoming)));
        let Opened { sender, ending, .. } = opened.await.unwrap();
        let sizes = [0usize, 1, 70_000, 9 << 20, 3, 300_000];
        for (step, size) in sizes.iter().enumerate() {
            let id = Some(WorkId { step: step as u64, ..WorkId::default() });
            assert!(sender.send(ExpertBatch { id, x: vec![step as u8; *size].into(), ..ExpertBatch::default() }).await);
        }
        for (step, size) in sizes.iter().enumerate() {
            let Some(Incoming::Answer(answer)) = incoming.recv().await else { panic!("an answer") };
            assert_eq!(answer.id.unwrap().step, step as u64);
            assert!(answer.sums[0].sum.len() == *size && answer.sums[0].sum.iter().all(|b| *b == step as u8));
        }
        drop(stop);
        drop(ending);
        assert!(matches!(incoming.recv().await, Some(Incoming::Closed(_))));
        assert!(!sender.post(ExpertBatch::default()), "nothing is sent any more");
    }
}
