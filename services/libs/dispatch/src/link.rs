//! The two seams of dispatch: towards the attention service, and towards expert shards.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_kernels::Published;
use conclave_proto::v1::{ExpertBatch, ExpertResult, MoeInput, MoeOutput, WorkId};
use tokio::time::Instant;

use crate::pair::{NoPair, Pair, Turn};

/// Why a batch did not come back from a shard.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The connection is gone or was never there.
    #[error("shard {instance}: {message}")]
    Lost { instance: String, message: String },
    /// Another process answers there, or the same with another checkpoint.
    #[error("shard {instance}: refused: {message}")]
    Refused { instance: String, message: String },
    /// The sums of an answer that lay in the pair cannot be had; in messages they can.
    #[error("shard {instance}: pair: {message}")]
    Pair { instance: String, message: String },
}

/// One shard, reached in process or over a persistent gRPC stream.
#[async_trait]
pub trait ShardLink: Send + Sync + 'static {
    /// Runs one batch. Cancel-safe: dropping the future drops the answer.
    ///
    /// # Errors
    /// When the link is lost. What the shard itself says stands in [`ExpertResult::error`].
    async fn compute(&self, batch: ExpertBatch) -> Result<ExpertResult, LinkError>;

    /// Whether the other side is still there, as far as is known without asking.
    fn alive(&self) -> bool {
        true
    }

    /// When the shard last said that it works, and this work waits for its turn or is being done.
    fn last_sign(&self, _work: WorkId) -> Option<Instant> {
        None
    }

    /// How messages go.
    fn transport(&self) -> Transport {
        Transport::InProcess
    }

    /// By which rows and sums can go past the messages, or why they cannot.
    ///
    /// # Errors
    /// Why there is none.
    fn pair(&self) -> Result<&Arc<Pair>, NoPair> {
        Err(NoPair::InProcess)
    }

    /// Runs one batch whose rows are on the caller's board, in its turn of this link's pair.
    ///
    /// # Errors
    /// When the link is lost, or sums cannot be had from the pair.
    async fn compute_by_pair(&self, batch: ExpertBatch, turn: Turn) -> Result<ExpertResult, LinkError> {
        drop((batch, turn));
        Err(LinkError::Pair { instance: String::new(), message: "this link has none".to_owned() })
    }
}

/// How messages go to a shard or a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// They are not encoded.
    InProcess,
    /// Over a Unix socket.
    SameHost,
    /// Over TCP.
    Tcp,
}

impl Transport {
    /// Name in metrics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::InProcess => "in-process",
            Self::SameHost => "same-host",
            Self::Tcp => "tcp",
        }
    }
}

/// Makes links to members.
#[async_trait]
pub trait ShardConnector: Send + Sync + 'static {
    /// Connects and checks instance and fingerprint.
    ///
    /// # Errors
    /// When nobody answers, or somebody else.
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError>;
}

/// Where attention sends its MoE layers: the embedded dispatcher, or a router's.
#[async_trait]
pub trait MoeLink: Send + Sync + 'static {
    /// Runs the routed experts of one layer.
    ///
    /// # Errors
    /// With the kind that the request ends with.
    async fn moe(&self, input: MoeInput) -> Result<MoeOutput, conclave_serve::Error>;

    /// The same with rows that are also on the board of the device of this process, until the call has ended.
    ///
    /// # Errors
    /// As for [`Self::moe`].
    async fn moe_published(&self, input: MoeInput, rows: Published) -> Result<MoeOutput, conclave_serve::Error> {
        drop(rows);
        self.moe(input).await
    }
}
