//! Links to expert shards of other processes: one persistent stream each.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_proto::v1::expert_client::ExpertClient;
use conclave_proto::v1::{ExpertBatch, ExpertResult, Hello, PairGrant, WorkId};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES, PAIR_HEADER};
use prost::Message;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue, MetadataMap};
use tonic::{Code, Request, Status};

use super::answers;
use super::channel::{self, QUEUE};
use super::outgoing::Outgoing;
use super::pending::{Pending, Ticket};
use crate::link::{LinkError, ShardConnector, ShardLink, Transport};
use crate::pair::{NoPair, Offered, Pair, Pairs, Turn};
use crate::stream::OpenError;

/// Connects to expert shards of other processes.
#[derive(Clone)]
pub struct RemoteShards {
    fingerprint: String,
    connect_timeout: Duration,
    /// Name of this host; `None`: TCP only.
    host: Option<String>,
    pairs: Pairs,
}

impl RemoteShards {
    /// For shards of one checkpoint. `host`: name of this host, for the short way to shards on it; `None`: TCP only.
    pub fn new(fingerprint: impl Into<String>, connect_timeout: Duration, host: Option<String>) -> Self {
        Self { fingerprint: fingerprint.into(), connect_timeout, host, pairs: Pairs::Without(NoPair::Unasked) }
    }

    /// The same whose links have pairs.
    #[must_use]
    pub fn with_pairs(self, pairs: Pairs) -> Self {
        Self { pairs, ..self }
    }

    /// A link, unless it has to have a pair and has none.
    fn checked(&self, link: RemoteShard) -> Result<Arc<dyn ShardLink>, LinkError> {
        match (&self.pairs, &link.pair) {
            (Pairs::Required(device), Err(why)) => {
                let message = format!("payload {} is asked for: {why}", device.way().name());
                Err(LinkError::Refused { instance: link.instance, message })
            }
            _ => Ok(Arc::new(link)),
        }
    }

    /// Over gRPC.
    async fn dial(&self, member: &Member) -> Result<RemoteShard, LinkError> {
        let instance = member.instance.0.clone();
        let lost = |message: String| LinkError::Lost { instance: instance.clone(), message };
        let channel = channel::connect(&member.address, self.connect_timeout).await.map_err(lost)?;
        let mut client = ExpertClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let mut request = Request::new(ReceiverStream::new(queue));
        for (header, value) in [(INSTANCE_HEADER, &instance), (FINGERPRINT_HEADER, &self.fingerprint)] {
            let value = AsciiMetadataValue::try_from(value.as_str())
                .map_err(|_| lost(format!("{header}: {value:?} cannot be sent as metadata")))?;
            request.metadata_mut().insert(header, value);
        }
        let offered = self.pairs.offer(false);
        if let Ok(Offered { offer, .. }) = &offered {
            request.metadata_mut().insert_bin(PAIR_HEADER, BinaryMetadataValue::from_bytes(&offer.encode_to_vec()));
        }
        let response = client.compute(request).await.map_err(|status| refusal(&instance, &status))?;
        let pair = offered.and_then(|offered| offered.open(granted(response.metadata()).as_ref(), None));
        let pending = Pending::new();
        tokio::spawn(answers::demultiplex(response.into_inner(), "the shard", pending.clone(), settle));
        Ok(RemoteShard { instance, outgoing: Arc::new(Outgoing::Grpc(outgoing)), pending, pair })
    }

    /// Over the socket of a member of this host.
    async fn open(&self, member: &Member, socket: &str) -> Result<RemoteShard, LinkError> {
        let (instance, fingerprint) = (member.instance.0.clone(), self.fingerprint.clone());
        let pending = Pending::new();
        let offered = self.pairs.offer(true);
        let pair = offered.as_ref().ok().map(|offered| offered.offer.clone());
        let hello = Hello { service: "expert".to_owned(), instance: instance.clone(), fingerprint, pair };
        match answers::open(socket, hello, pending.clone(), settle).await {
            Ok((outgoing, grant)) => {
                let pair = offered.and_then(|offered| offered.open(grant.as_ref(), outgoing.connection()));
                Ok(RemoteShard { instance, outgoing: Arc::new(outgoing), pending, pair })
            }
            Err(OpenError::Lost(message)) => Err(LinkError::Lost { instance, message }),
            Err(OpenError::Refused(message)) => Err(LinkError::Refused { instance, message }),
        }
    }
}

#[async_trait]
impl ShardConnector for RemoteShards {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError> {
        if let Some(socket) = member.socket_on(self.host.as_deref()) {
            match self.open(member, socket).await {
                Ok(link) => return self.checked(link),
                Err(error) => tracing::info!(%error, "not reached as a member of this host, TCP is tried"),
            }
        }
        self.checked(self.dial(member).await?)
    }
}

/// What a shard answered to an offer.
fn granted(metadata: &MetadataMap) -> Option<PairGrant> {
    let grant = metadata.get_bin(PAIR_HEADER)?.to_bytes().ok()?;
    Some(PairGrant::decode(grant).unwrap_or_else(|error| {
        let refused = format!("{PAIR_HEADER} of its answer: {error}");
        PairGrant { refused, ..PairGrant::default() }
    }))
}

fn refusal(instance: &str, status: &Status) -> LinkError {
    let (instance, message) = (instance.to_owned(), status.message().to_owned());
    match status.code() {
        Code::FailedPrecondition => LinkError::Refused { instance, message },
        _ => LinkError::Lost { instance, message },
    }
}

fn settle(pending: &Pending<WorkId, ExpertResult>, result: ExpertResult) {
    match result.id {
        Some(id) if result.sign_of_life => pending.sign(&id),
        Some(id) => pending.answer(&id, result),
        None => {}
    }
}

struct RemoteShard {
    instance: String,
    outgoing: Arc<Outgoing<ExpertBatch>>,
    pending: Arc<Pending<WorkId, ExpertResult>>,
    /// Dropped after nobody sends any more: it ends the connection.
    pair: Result<Arc<Pair>, NoPair>,
}

/// A batch that was sent and is not answered. If dropped, it tells the shard that an answer is no longer wanted; one by pair
/// is waited for all the same, however late it comes.
struct Sent {
    ticket: Option<Ticket<WorkId, ExpertResult>>,
    turn: Option<Turn>,
    id: WorkId,
    outgoing: Arc<Outgoing<ExpertBatch>>,
}

impl Sent {
    /// The answer, with the batch's turn.
    async fn answer(mut self) -> Result<(ExpertResult, Option<Turn>), String> {
        let waiting = self.ticket.as_mut().ok_or("the batch is not waited for")?;
        let answered = waiting.wait().await;
        self.ticket = None;
        Ok((answered?, self.turn.take()))
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        let Some(mut ticket) = self.ticket.take() else { return };
        self.outgoing.try_send(ExpertBatch { id: Some(self.id), cancel: true, ..ExpertBatch::default() });
        if let (Some(turn), Ok(runtime)) = (self.turn.take(), Handle::try_current()) {
            runtime.spawn(async move {
                if let Ok(mut late) = ticket.wait().await {
                    // Where its sums cannot be had, nobody misses them.
                    let _ = turn.collect(&mut late).await;
                }
            });
        }
    }
}

impl RemoteShard {
    fn lost(&self, message: String) -> LinkError {
        LinkError::Lost { instance: self.instance.clone(), message }
    }

    fn past(&self, message: String) -> LinkError {
        LinkError::Pair { instance: self.instance.clone(), message }
    }

    async fn send(&self, mut batch: ExpertBatch, turn: Option<Turn>) -> Result<Sent, LinkError> {
        batch.signs_of_life = true;
        let id = batch.id.unwrap_or_default();
        let ticket = self.pending.register(id).map_err(|message| self.lost(message))?;
        if !self.outgoing.send(batch).await {
            return Err(self.lost(self.pending.closed().unwrap_or_else(|| "the stream is closed".to_owned())));
        }
        Ok(Sent { ticket: Some(ticket), turn, id, outgoing: self.outgoing.clone() })
    }
}

#[async_trait]
impl ShardLink for RemoteShard {
    async fn compute(&self, batch: ExpertBatch) -> Result<ExpertResult, LinkError> {
        let sent = self.send(batch, None).await?;
        let (result, _) = sent.answer().await.map_err(|message| self.lost(message))?;
        Ok(result)
    }

    async fn compute_by_pair(&self, mut batch: ExpertBatch, turn: Turn) -> Result<ExpertResult, LinkError> {
        let mut giving = turn.give(&mut batch);
        let sent = self.send(batch, Some(turn)).await?;
        let (mut result, turn) = tokio::select! {
            biased;
            answered = sent.answer() => answered.map_err(|message| self.lost(message))?,
            message = giving.failed() => return Err(self.past(message)),
        };
        if let Some(turn) = turn {
            turn.collect(&mut result).await.map_err(|message| self.past(message))?;
        }
        Ok(result)
    }

    fn pair(&self) -> Result<&Arc<Pair>, NoPair> {
        self.pair.as_ref().map_err(Clone::clone)
    }

    fn alive(&self) -> bool {
        self.pending.closed().is_none()
    }

    fn last_sign(&self, work: WorkId) -> Option<Instant> {
        self.pending.last_sign(&work)
    }

    fn transport(&self) -> Transport {
        self.outgoing.transport()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_comes_as_metadata_and_nonsense_is_none() {
        let of = |value: Option<&[u8]>| {
            let mut metadata = MetadataMap::new();
            value.map(|value| metadata.insert_bin(PAIR_HEADER, BinaryMetadataValue::from_bytes(value)));
            granted(&metadata)
        };
        assert_eq!(of(None), None, "a shard that knows of no pairs");
        let grant = PairGrant { sums_bytes: 9, ..PairGrant::default() };
        assert_eq!(of(Some(&grant.encode_to_vec())), Some(grant));
        let refused = of(Some(&[0xff; 3])).unwrap().refused;
        assert!(refused.starts_with("conclave-pair-bin of its answer: "), "{refused}");
    }
}
