//! The gRPC face of the service.

use std::sync::Arc;

use conclave_proto::v1::attention_server::{Attention, AttentionServer};
use conclave_proto::v1::{AttentionStatus, DrainRequest, DrainResponse, SequenceRequest, StatusRequest, TokenEvent};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES};
use conclave_serve::{Error, ErrorKind};
use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::AttentionService;

/// Unwraps, calls, converts.
#[derive(Debug, Clone)]
pub struct AttentionGrpc {
    service: Arc<AttentionService>,
}

impl AttentionService {
    /// The tonic service.
    pub fn grpc_server(self: &Arc<Self>) -> AttentionServer<AttentionGrpc> {
        AttentionServer::new(AttentionGrpc { service: Arc::clone(self) })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Whether the caller means this process: addresses are reused.
    fn check_caller(&self, metadata: &MetadataMap, required: bool) -> Result<(), Error> {
        let identity = self.identity();
        for (header, own) in [(INSTANCE_HEADER, &identity.instance.0), (FINGERPRINT_HEADER, &identity.fingerprint)] {
            let found = metadata.get(header).map(|value| value.to_str().unwrap_or("not text"));
            if found != Some(own) && (required || found.is_some()) {
                let message = format!("{header}: found {}, expected {own}", found.unwrap_or("nothing"));
                return Err(Error::new(ErrorKind::FailedPrecondition, message));
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Attention for AttentionGrpc {
    type GenerateStream = BoxStream<'static, Result<TokenEvent, Status>>;

    async fn generate(&self, request: Request<SequenceRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        self.service.check_caller(request.metadata(), true)?;
        let events = self.service.generate(request.into_inner())?;
        Ok(Response::new(events.map(|event| event.map_err(Status::from)).boxed()))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<AttentionStatus>, Status> {
        self.service.check_caller(request.metadata(), false)?;
        Ok(Response::new(self.service.status()))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.service.check_caller(request.metadata(), false)?;
        self.service.drain().await;
        Ok(Response::new(DrainResponse {}))
    }
}
