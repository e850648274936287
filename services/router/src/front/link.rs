//! The seam between the front and attention replicas.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_proto::v1::{AttentionStatus, SequenceRequest, TokenEvent};
use conclave_serve::Error;
use futures::stream::BoxStream;

/// One attention replica, reached in process or over gRPC.
#[async_trait]
pub trait AttentionLink: Send + Sync + 'static {
    /// Runs a sequence; dropping the stream cancels it.
    ///
    /// # Errors
    /// When the replica refuses it. A lost connection is [`conclave_serve::ErrorKind::Unavailable`], here and in the
    /// stream.
    async fn generate(&self, request: SequenceRequest) -> Result<BoxStream<'static, Result<TokenEvent, Error>>, Error>;

    /// State and load.
    ///
    /// # Errors
    /// When the replica does not answer.
    async fn status(&self) -> Result<AttentionStatus, Error>;
}

/// Makes links to attention replicas.
#[async_trait]
pub trait AttentionConnector: Send + Sync + 'static {
    /// Connects to a member.
    ///
    /// # Errors
    /// When nobody answers there.
    async fn connect(&self, member: &Member) -> Result<Arc<dyn AttentionLink>, Error>;
}
