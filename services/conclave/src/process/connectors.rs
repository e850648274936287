//! Links between parts of one process.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_dispatch::{Dispatcher, LinkError, MoeLink, ShardConnector, ShardLink};
use conclave_proto::{
    CellId, InstanceId,
    v1::{MoeInput, MoeOutput},
};
use conclave_router::front::{AttentionConnector, AttentionLink, ClusterLoad};
use conclave_serve::{Error, ErrorKind};

/// Expert shards of this process, by instance.
pub struct LocalShards(pub HashMap<InstanceId, Arc<dyn ShardLink>>);

#[async_trait]
impl ShardConnector for LocalShards {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError> {
        self.0.get(&member.instance).cloned().ok_or_else(|| LinkError::Lost {
            instance: member.instance.to_string(),
            message: "not in this process".to_owned(),
        })
    }
}

/// The attention service of this process.
pub struct LocalAttention(pub Arc<dyn AttentionLink>);

#[async_trait]
impl AttentionConnector for LocalAttention {
    async fn connect(&self, _: &Member) -> Result<Arc<dyn AttentionLink>, Error> {
        Ok(self.0.clone())
    }
}

/// The dispatch of a model whose layers are all dense: never asked.
pub struct NoExperts;

#[async_trait]
impl MoeLink for NoExperts {
    async fn moe(&self, input: MoeInput) -> Result<MoeOutput, Error> {
        Err(Error::new(ErrorKind::Internal, format!("layer {}: this model has no experts", input.layer)))
    }
}

/// What the dispatcher of this process knows of the shards, for the cluster view.
pub struct DispatcherLoad(pub Arc<Dispatcher>);

impl ClusterLoad for DispatcherLoad {
    fn health(&self, instance: &InstanceId) -> Option<String> {
        Some(self.0.health(instance).to_owned())
    }

    fn queued_rows(&self, instance: &InstanceId) -> Option<u32> {
        self.0.queued_rows(instance)
    }

    fn cell_rows(&self, cell: CellId) -> u64 {
        self.0.cell_rows().into_iter().find(|(id, _)| *id == cell).map_or(0, |(_, rows)| rows)
    }
}
