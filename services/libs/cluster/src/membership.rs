//! The membership trait: who is there, and how a process becomes one of them.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{ClusterView, Member, MemberState};

/// What can go wrong between a process and the coordinator.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClusterError {
    /// Nobody answers.
    #[error("coordinator {endpoints}: {message}")]
    Unreachable { endpoints: String, message: String },
    /// A live member has this id.
    #[error(
        "instance {instance}: already registered by a live {role} at {address}; choose another id, or wait for the lease \
         of a process that has died"
    )]
    InstanceTaken { instance: String, role: String, address: String },
    /// The member cannot be placed as asked.
    #[error("placement: {0}")]
    Placement(String),
    /// The coordinator refused or answered nonsense.
    #[error("coordinator: {0}")]
    Protocol(String),
}

impl ClusterError {
    /// The id is `holder`'s.
    pub(crate) fn taken(holder: &Member) -> Self {
        Self::InstanceTaken {
            instance: holder.instance.0.clone(),
            role: holder.role.name().to_owned(),
            address: holder.address.clone(),
        }
    }
}

/// Decides the member's record from what is there now: pure, called again when somebody else came in between.
pub type MakeMember = Arc<dyn Fn(&ClusterView) -> Result<Member, ClusterError> + Send + Sync>;

/// A way to know the members of a cluster and to become one.
#[async_trait]
pub trait Membership: Send + Sync + 'static {
    /// Joins: makes the record from the current view and writes it in one transaction that fails if the id is taken or the
    /// view has changed meanwhile (then it is made again). The record lives as long as the registration and its process.
    ///
    /// # Errors
    /// When the id is taken, the placement is impossible or the coordinator cannot be reached.
    async fn register(&self, make: MakeMember) -> Result<Box<dyn Registration>, ClusterError>;

    /// The members, kept current; the last known ones while the coordinator is away.
    fn watch(&self) -> watch::Receiver<Arc<ClusterView>>;
}

/// A member's own record. Dropping it leaves the record to its lease.
#[async_trait]
pub trait Registration: Send + Sync {
    /// The record as it stands.
    fn member(&self) -> Member;
    /// Changes the state.
    ///
    /// # Errors
    /// When the coordinator cannot be reached; the record is written when it is back.
    async fn set_state(&self, state: MemberState) -> Result<(), ClusterError>;
    /// Removes the record at once.
    ///
    /// # Errors
    /// When the coordinator cannot be reached (the lease then ends it).
    async fn leave(&self) -> Result<(), ClusterError>;
}
