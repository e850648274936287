//! Attention replicas over gRPC.

use std::{error::Error as _, sync::Arc, time::Duration};

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_proto::{
    FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES,
    v1::{AttentionStatus, SequenceRequest, StatusRequest, TokenEvent, attention_client::AttentionClient},
};
use conclave_serve::{Error, ErrorKind};
use futures::{StreamExt, stream::BoxStream};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::link::{AttentionConnector, AttentionLink};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A replica that hangs or whose host is gone is noticed after this and as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(3);

/// Connects to attention replicas at their members' addresses.
#[derive(Debug)]
pub struct GrpcAttention {
    fingerprint: MetadataValue<Ascii>,
}

impl GrpcAttention {
    /// Connects on behalf of a checkpoint; replicas of another one refuse.
    ///
    /// # Errors
    /// When the fingerprint is no ASCII text.
    pub fn new(fingerprint: &str) -> Result<Self, Error> {
        Ok(Self { fingerprint: ascii("fingerprint", fingerprint)? })
    }
}

#[async_trait]
impl AttentionConnector for GrpcAttention {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn AttentionLink>, Error> {
        let unavailable = |error: tonic::transport::Error| {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            let message = format!("attention {} at {}: {cause}", member.instance, member.address);
            Error::new(ErrorKind::Unavailable, message)
        };
        let endpoint = Endpoint::from_shared(member.address.clone()).map_err(unavailable)?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .connect()
            .await
            .map_err(unavailable)?;
        Ok(Arc::new(GrpcLink {
            client: AttentionClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
            instance: ascii("instance", &member.instance.0)?,
            fingerprint: self.fingerprint.clone(),
        }))
    }
}

/// One replica.
struct GrpcLink {
    client: AttentionClient<Channel>,
    instance: MetadataValue<Ascii>,
    fingerprint: MetadataValue<Ascii>,
}

impl GrpcLink {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(INSTANCE_HEADER, self.instance.clone());
        request.metadata_mut().insert(FINGERPRINT_HEADER, self.fingerprint.clone());
        request
    }
}

#[async_trait]
impl AttentionLink for GrpcLink {
    async fn generate(&self, request: SequenceRequest) -> Result<BoxStream<'static, Result<TokenEvent, Error>>, Error> {
        let events = self.client.clone().generate(self.request(request)).await.map_err(link_error)?.into_inner();
        Ok(events.map(|event| event.map_err(link_error)).boxed())
    }

    async fn status(&self) -> Result<AttentionStatus, Error> {
        let status = self.client.clone().status(self.request(StatusRequest {})).await.map_err(link_error)?;
        Ok(status.into_inner())
    }
}

/// A status that the replica sent keeps its kind; one that the transport made (it has a source) is a lost connection,
/// whatever code it was given.
fn link_error(status: Status) -> Error {
    match status.source() {
        Some(_) => Error::new(ErrorKind::Unavailable, format!("attention connection: {}", status.message())),
        None => status.into(),
    }
}

fn ascii(name: &str, value: &str) -> Result<MetadataValue<Ascii>, Error> {
    value.parse().map_err(|_| Error::invalid(format!("{name}: found {value:?}, expected visible ASCII text")))
}
