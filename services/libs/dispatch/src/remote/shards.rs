//! Links to expert shards of other processes: one persistent stream each.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_proto::v1::expert_client::ExpertClient;
use conclave_proto::v1::{ExpertBatch, ExpertResult, Hello, WorkId};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Code, Request, Status};

use super::answers;
use super::channel::{self, QUEUE};
use super::outgoing::Outgoing;
use super::pending::{Pending, Ticket};
use crate::link::{LinkError, ShardConnector, ShardLink, Transport};
use crate::stream::OpenError;

/// Connects to expert shards of other processes.
#[derive(Debug, Clone)]
pub struct RemoteShards {
    fingerprint: String,
    connect_timeout: Duration,
    /// Name of this host; `None`: TCP only.
    host: Option<String>,
}

impl RemoteShards {
    /// For shards of one checkpoint. `host`: name of this host, for the short way to shards on it; `None`: TCP only.
    pub fn new(fingerprint: impl Into<String>, connect_timeout: Duration, host: Option<String>) -> Self {
        Self { fingerprint: fingerprint.into(), connect_timeout, host }
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
        let answers = client.compute(request).await.map_err(|status| refusal(&instance, &status))?.into_inner();
        let pending = Pending::new();
        tokio::spawn(answers::demultiplex(answers, "the shard", pending.clone(), settle));
        Ok(RemoteShard { instance, outgoing: Arc::new(Outgoing::Grpc(outgoing)), pending })
    }

    /// Over the socket of a member of this host.
    async fn open(&self, member: &Member, socket: &str) -> Result<RemoteShard, LinkError> {
        let (instance, fingerprint) = (member.instance.0.clone(), self.fingerprint.clone());
        let pending = Pending::new();
        let hello = Hello { service: "expert".to_owned(), instance: instance.clone(), fingerprint };
        match answers::open(socket, hello, pending.clone(), settle).await {
            Ok(outgoing) => Ok(RemoteShard { instance, outgoing: Arc::new(outgoing), pending }),
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
                Ok(link) => return Ok(Arc::new(link)),
                Err(error) => tracing::info!(%error, "not reached as a member of this host, TCP is tried"),
            }
        }
        Ok(Arc::new(self.dial(member).await?))
    }
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
}

/// Tells the shard that an answer is no longer wanted, if dropped before it came.
struct Wanted {
    ticket: Ticket<WorkId, ExpertResult>,
    id: Option<WorkId>,
    outgoing: Arc<Outgoing<ExpertBatch>>,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        if self.id.is_some() {
            self.outgoing.try_send(ExpertBatch { id: self.id, cancel: true, ..ExpertBatch::default() });
        }
    }
}

#[async_trait]
impl ShardLink for RemoteShard {
    async fn compute(&self, mut batch: ExpertBatch) -> Result<ExpertResult, LinkError> {
        batch.signs_of_life = true;
        let lost = |message: String| LinkError::Lost { instance: self.instance.clone(), message };
        let id = batch.id.unwrap_or_default();
        let ticket = self.pending.register(id).map_err(lost)?;
        let mut wanted = Wanted { ticket, id: None, outgoing: self.outgoing.clone() };
        if !self.outgoing.send(batch).await {
            return Err(lost(self.pending.closed().unwrap_or_else(|| "the stream is closed".to_owned())));
        }
        wanted.id = Some(id);
        let result = wanted.ticket.wait().await.map_err(lost);
        wanted.id = None;
        result
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
