//! A tiny model (V2's structure, 128 wide, experts of 25 thousand parameters) with one shard and one router, served from
//! this process at loopback addresses: each on a runtime with a thread of its own, as a process would be.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use conclave_cluster::{LocalMembership, Member, MemberState, Registration, Role};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, GrpcShards, LinkError, ModelShape, ShardConnector, ShardLink, serve_dispatch,
};
use conclave_expert::ExpertConfig;
use conclave_kernels::Device;
use conclave_model::{
    Checkpoint,
    synth::{self, Preset, SynthOptions},
};
use conclave_proto::{
    CellId, GroupId, InstanceId,
    v1::{ExpertBatch, ExpertResult},
};
use conclave_router::{dispatch_routes, serve_grpc};
use prometheus::Registry;
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::process::{blocking, connectors::LocalShards, expert_node::ExpertNode, in_process::join, member};

/// Who has not been found for so long is not there.
pub const NOBODY_THERE: Duration = Duration::from_secs(3);

/// The model and its servers.
pub struct Rig {
    /// The model.
    pub checkpoint: Arc<Checkpoint>,
    /// Its shard and its router.
    pub cluster: LocalMembership,
    /// The shard, without its server.
    pub shards: Arc<dyn ShardConnector>,
    /// What it says of its work there.
    pub busy: Busy,
    /// Held: servers and records go when these do, then the files.
    _servers: Vec<Server>,
    _registrations: Vec<Box<dyn Registration>>,
    _files: TempDir,
}

impl Rig {
    /// Makes the model and serves it.
    ///
    /// # Errors
    /// When there is no room, address or thread.
    pub async fn start<D: Device>(device: &Arc<D>) -> Result<Self> {
        let files = TempDir::new()?;
        let checkpoint = tiny_model(&files).await?;
        let cluster = LocalMembership::new("bench");

        let cells: Vec<CellId> = (0..checkpoint.config().cell_groups() as u32).map(cell).collect();
        let (on, from, held) = (device.clone(), checkpoint.clone(), cells.clone());
        let load = move || ExpertNode::on(ExpertConfig::new("expert"), on, from, &held, &Registry::new());
        let node = blocking("load the tiny model", load).await?;
        let shard = Server::start(node.routes).await?;
        let record = member::record("expert", Role::Expert, shard.address.clone(), &checkpoint, device.numerics());
        let expert = join(&cluster, Member { cells, state: MemberState::Ready, ..record }).await?;

        let dispatch = serve_dispatch(grpc_dispatcher(&checkpoint, &cluster)?, CancellationToken::new());
        let router = Server::start(dispatch_routes(dispatch)).await?;
        let record = member::record("router", Role::Router, router.address.clone(), &checkpoint, String::new());
        let dispatch = join(&cluster, Member { hosts_dispatch: true, state: MemberState::Ready, ..record }).await?;
        let busy = Busy::default();
        let link: Arc<dyn ShardLink> = Arc::new(Watched { link: node.link, busy: busy.clone() });
        Ok(Self {
            shards: Arc::new(LocalShards(HashMap::from([(InstanceId("expert".to_owned()), link)]))),
            checkpoint,
            cluster,
            busy,
            _servers: vec![router, shard],
            _registrations: vec![expert, dispatch],
            _files: files,
        })
    }
}

/// Microseconds of each grouped FFN, as the shard reports them.
#[derive(Debug, Clone, Default)]
pub struct Busy(Arc<Mutex<Vec<f64>>>);

impl Busy {
    /// All so far.
    pub fn samples(&self) -> Vec<f64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A shard whose reports are read along.
struct Watched {
    link: Arc<dyn ShardLink>,
    busy: Busy,
}

#[async_trait]
impl ShardLink for Watched {
    async fn compute(&self, batch: ExpertBatch) -> Result<ExpertResult, LinkError> {
        let result = self.link.compute(batch).await?;
        self.busy.0.lock().unwrap_or_else(PoisonError::into_inner).push(result.busy_us as f64);
        Ok(result)
    }

    fn alive(&self) -> bool {
        self.link.alive()
    }
}

/// Makes the model.
///
/// # Errors
/// When there is no room.
pub async fn tiny_model(files: &TempDir) -> Result<Arc<Checkpoint>> {
    let out = files.path().join("model");
    blocking("make a tiny model", move || {
        let location = out.display().to_string();
        let options = SynthOptions { preset: Preset::Tiny, layers: None, vocab: None, seed: 0, out };
        synth::write(&options, &|_, _| {})?;
        Ok(Arc::new(Checkpoint::open(&location)?))
    })
    .await
}

fn cell(group: u32) -> CellId {
    CellId { span: 0, group: GroupId(group) }
}

/// Dispatch to the shards of a cluster at their addresses.
///
/// # Errors
/// When the model has no experts.
pub fn grpc_dispatcher(checkpoint: &Checkpoint, cluster: &LocalMembership) -> Result<Arc<Dispatcher>> {
    let connect_timeout = dispatch_config(checkpoint).connect_timeout;
    dispatcher(checkpoint, cluster, Arc::new(GrpcShards::new(checkpoint.fingerprint(), connect_timeout)))
}

/// Dispatch to the shards of a cluster over links of the caller's choice.
///
/// # Errors
/// When the model has no experts.
pub fn dispatcher(
    checkpoint: &Checkpoint,
    cluster: &LocalMembership,
    shards: Arc<dyn ShardConnector>,
) -> Result<Arc<Dispatcher>> {
    let shape = ModelShape::new(checkpoint.config()).context("a model with experts")?;
    Ok(Dispatcher::new(dispatch_config(checkpoint), shape, cluster, shards, &Registry::new()))
}

fn dispatch_config(checkpoint: &Checkpoint) -> DispatchConfig {
    DispatchConfig { no_replica_timeout: NOBODY_THERE, ..DispatchConfig::new(checkpoint.fingerprint()) }
}

/// A gRPC server on a runtime of its own; ends when dropped.
pub struct Server {
    /// `http://host:port`
    pub address: String,
    stop: CancellationToken,
    runtime: Option<Runtime>,
}

impl Server {
    /// Serves at a free loopback port.
    ///
    /// # Errors
    /// When there is no address or thread.
    pub async fn start(routes: Routes) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("bench-server").enable_all().build()?;
        let stop = CancellationToken::new();
        let (listener, until) = (listener.into_std()?, stop.clone());
        runtime.spawn(async move {
            let served = async {
                let listener = TcpListener::from_std(listener)?;
                serve_grpc(listener, routes, until, Duration::ZERO).await.map_err(anyhow::Error::from)
            };
            if let Err(error) = served.await {
                tracing::error!(%error, "a server of the measurement has ended");
            }
        });
        Ok(Self { address, stop, runtime: Some(runtime) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            // Not to be waited for: this may be an async thread.
            runtime.shutdown_background();
        }
    }
}
