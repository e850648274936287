//! Links to expert shards: one persistent stream each.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_proto::v1::expert_client::ExpertClient;
use conclave_proto::v1::{ExpertBatch, ExpertResult, WorkId};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Code, Request, Status, Streaming};

use super::channel::{self, QUEUE};
use super::pending::{Pending, Ticket};
use crate::link::{LinkError, ShardConnector, ShardLink};

/// A [`WorkId`] as a key: caller, step, layer, attempt, part.
type Key = (u64, u64, u32, u32, u32);

fn key(id: WorkId) -> Key {
    (id.caller, id.step, id.layer, id.attempt, id.part)
}

/// Connects to expert shards over gRPC.
#[derive(Debug, Clone)]
pub struct GrpcShards {
    fingerprint: String,
    connect_timeout: Duration,
}

impl GrpcShards {
    /// For shards of one checkpoint.
    pub fn new(fingerprint: impl Into<String>, connect_timeout: Duration) -> Self {
        Self { fingerprint: fingerprint.into(), connect_timeout }
    }
}

#[async_trait]
impl ShardConnector for GrpcShards {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError> {
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
        tokio::spawn(demultiplex(answers, pending.clone()));
        Ok(Arc::new(GrpcLink { instance, outgoing, pending }))
    }
}

fn refusal(instance: &str, status: &Status) -> LinkError {
    let (instance, message) = (instance.to_owned(), status.message().to_owned());
    match status.code() {
        Code::FailedPrecondition => LinkError::Refused { instance, message },
        _ => LinkError::Lost { instance, message },
    }
}

async fn demultiplex(mut answers: Streaming<ExpertResult>, pending: Arc<Pending<Key, ExpertResult>>) {
    let reason = loop {
        match answers.message().await {
            Ok(Some(result)) => {
                if let Some(id) = result.id {
                    pending.answer(&key(id), result);
                }
            }
            Ok(None) => break "the shard ended the stream".to_owned(),
            Err(status) => break status.message().to_owned(),
        }
    };
    pending.close(reason);
}

struct GrpcLink {
    instance: String,
    outgoing: mpsc::Sender<ExpertBatch>,
    pending: Arc<Pending<Key, ExpertResult>>,
}

/// Tells the shard that an answer is no longer wanted, if dropped before it came.
struct Wanted {
    ticket: Ticket<Key, ExpertResult>,
    id: Option<WorkId>,
    outgoing: mpsc::Sender<ExpertBatch>,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        if self.id.is_some() {
            // With a full queue the shard works in vain, and its answer is dropped.
            let _ = self.outgoing.try_send(ExpertBatch { id: self.id, cancel: true, ..ExpertBatch::default() });
        }
    }
}

#[async_trait]
impl ShardLink for GrpcLink {
    async fn compute(&self, batch: ExpertBatch) -> Result<ExpertResult, LinkError> {
        let lost = |message: String| LinkError::Lost { instance: self.instance.clone(), message };
        let id = batch.id.unwrap_or_default();
        let ticket = self.pending.register(key(id)).map_err(lost)?;
        let mut wanted = Wanted { ticket, id: None, outgoing: self.outgoing.clone() };
        if self.outgoing.send(batch).await.is_err() {
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
}
