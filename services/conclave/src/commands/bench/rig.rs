//! A tiny model (V2's structure, 128 wide, experts of 25 thousand parameters) with one shard and one router, served from
//! this process at loopback addresses and Unix sockets: each on a lane of its own, as in a process of its own.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use conclave_cluster::{LocalMembership, Member, MemberState, Registration, Role, SameHost};
use conclave_dispatch::{DispatchConfig, Dispatcher, LinkError, ModelShape, RemoteShards, ShardConnector, ShardLink};
use conclave_expert::ExpertConfig;
use conclave_kernels::Device;
use conclave_model::{
    Checkpoint,
    synth::{self, Preset, SynthDtype, SynthOptions},
};
use conclave_proto::{
    CellId, GroupId, InstanceId,
    v1::{ExpertBatch, ExpertResult},
};
use conclave_serve::{Lane, listen::MemberListener, same_host::SameHost::Auto};
use prometheus::Registry;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::process::{
    blocking,
    connectors::LocalShards,
    expert_node::ExpertNode,
    host::{MemberService, serve_members},
    in_process::join,
    member,
    router::dispatch_service,
};

/// Who has not been found for so long is not there.
pub const NOBODY_THERE: Duration = Duration::from_secs(3);

/// The model and its servers.
pub struct Rig {
    /// The model.
    pub checkpoint: Arc<Checkpoint>,
    /// Its shard and a router, all over TCP.
    pub tcp: LocalMembership,
    /// The same shard and a router, all as members of one host.
    pub same_host: LocalMembership,
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
        let (tcp, same_host) = (LocalMembership::new("tcp"), LocalMembership::new("same host"));

        let cells: Vec<CellId> = (0..checkpoint.config().cell_groups() as u32).map(cell).collect();
        let (on, from, held) = (device.clone(), checkpoint.clone(), cells.clone());
        let load = move || ExpertNode::on(ExpertConfig::new("expert"), on, from, &held, &Registry::new());
        let node = blocking("load the tiny model", load).await?;
        let shard = Server::start("expert", node.lane.clone(), node.served).await?;
        let record = member::record("expert", Role::Expert, String::new(), &checkpoint, device.numerics());
        let expert = Member { cells, ..record };
        let (mut servers, mut registrations) = (Vec::new(), Vec::new());
        for (cluster, near) in [(&tcp, false), (&same_host, true)] {
            registrations.push(join(cluster, shard.record(expert.clone(), near)).await?);
            let lane = Lane::start("bench-dispatch")?;
            let dispatcher = grpc_dispatcher(&checkpoint, cluster)?;
            let stirrer = Some(lane.stirrer().clone());
            let dispatch = dispatch_service("router", &dispatcher, CancellationToken::new(), stirrer);
            let router = Server::start("router", lane, dispatch).await?;
            let record = member::record("router", Role::Router, String::new(), &checkpoint, String::new());
            let record = Member { hosts_dispatch: true, ..record };
            registrations.push(join(cluster, router.record(record, near)).await?);
            servers.push(router);
        }
        servers.push(shard);
        let busy = Busy::default();
        let link: Arc<dyn ShardLink> = Arc::new(Watched { link: node.link, busy: busy.clone() });
        Ok(Self {
            shards: Arc::new(LocalShards(HashMap::from([(InstanceId("expert".to_owned()), link)]))),
            checkpoint,
            tcp,
            same_host,
            busy,
            _servers: servers,
            _registrations: registrations,
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
        let (preset, dtype) = (Preset::Tiny, SynthDtype::Bf16);
        let options = SynthOptions { preset, layers: None, vocab: None, dtype, seed: 0, out };
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
    dispatcher(checkpoint, cluster, Arc::new(RemoteShards::new(checkpoint.fingerprint(), connect_timeout, Auto.host())))
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
    let shape = ModelShape::new(checkpoint)?.context("a model with experts")?;
    Ok(Dispatcher::new(dispatch_config(checkpoint), shape, cluster, shards, &Registry::new()))
}

fn dispatch_config(checkpoint: &Checkpoint) -> DispatchConfig {
    DispatchConfig { no_replica_timeout: NOBODY_THERE, ..DispatchConfig::new(checkpoint.fingerprint()) }
}

/// A gRPC server on a lane; ends when dropped.
pub struct Server {
    /// `http://host:port`
    pub address: String,
    /// Its socket for this host.
    pub same_host: Option<SameHost>,
    stop: CancellationToken,
    _lane: Arc<Lane>,
}

impl Server {
    /// Serves at a free loopback port and on a socket for this host.
    ///
    /// # Errors
    /// When there is no address.
    pub async fn start(name: &str, lane: Arc<Lane>, service: MemberService) -> Result<Self> {
        let listener = MemberListener::bind("127.0.0.1:0", Some(name)).await?;
        let address = format!("http://{}", listener.local_addr()?);
        let same_host = listener.socket().zip(Auto.host()).map(|(socket, host)| {
            let socket = socket.to_owned();
            SameHost { host, socket }
        });
        let stop = CancellationToken::new();
        let served = serve_members(lane.handle(), listener, service, (stop.clone(), Duration::ZERO))?;
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(%error, "a server of the measurement has ended");
            }
        });
        Ok(Self { address, same_host, stop, _lane: lane })
    }

    /// What a member says that is served here.
    fn record(&self, record: Member, same_host: bool) -> Member {
        let same_host = if same_host { self.same_host.clone() } else { None };
        Member { address: self.address.clone(), same_host, state: MemberState::Ready, ..record }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
