//! Shards and a caller of this process, on devices of their own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use conclave_cluster::{LocalMembership, Member, Registration, SameHost};
use conclave_dispatch::pair::{BoardDevice, LinkDevice, PairDevice, Pairs, Way};
use conclave_dispatch::{DispatchConfig, Dispatcher, ModelShape, MoeLink, RemoteShards, ShardLink};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::cuda::{Cuda, Shim};
use conclave_kernels::{Device, Dtype, activation};
use conclave_model::Checkpoint;
use conclave_serve::metrics;
use conclave_serve::same_host::{self, SameHost::Auto};
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::gated::{Gate, Gated};
use crate::support::{ALL, HIDDEN, InProcess, input, member, register, start, values};

/// Rows of the board.
pub(crate) const ROWS: usize = 12;
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) type Gpu = Cuda<Gated>;

pub(crate) fn gpu(seed: u64) -> (Arc<Gpu>, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    (Arc::new(Cuda::new(Gated { shim: Shim::new(seed), gate: gate.clone() })), gate)
}

/// The caller's side of pairs.
pub(crate) fn pair_device(way: Way, device: &Arc<Gpu>) -> Arc<dyn PairDevice> {
    match way {
        Way::Ipc => Arc::new(BoardDevice::new(device.clone(), ROWS, HIDDEN).unwrap()),
        Way::Nccl => Arc::new(LinkDevice::new(device.clone(), ROWS, HIDDEN).unwrap()),
    }
}

/// A shard on a device of its own, served on a runtime of its own, so that it can end as abruptly as a killed process.
pub(crate) struct Shard {
    pub(crate) name: String,
    pub(crate) groups: Vec<u32>,
    socket: String,
    /// Of its gRPC server.
    pub(crate) address: String,
    pub(crate) gate: Arc<Gate>,
    pub(crate) service: Arc<ExpertService<Gpu>>,
    runtime: Option<Runtime>,
}

impl Shard {
    pub(crate) fn start(name: &str, checkpoint: &Arc<Checkpoint>, groups: &[u32]) -> Self {
        // Its callers are not told that it is at work: it is to look dead.
        Self::with(ExpertConfig { sign_every: LIMIT, ..ExpertConfig::new(name) }, checkpoint, groups)
    }

    pub(crate) fn with(config: ExpertConfig, checkpoint: &Arc<Checkpoint>, groups: &[u32]) -> Self {
        let (device, gate) = gpu(groups.len() as u64);
        let name = config.instance.clone();
        let service = start(config, device, checkpoint, groups);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let _inside = runtime.enter();
        let (listener, socket) = same_host::listen(&name).unwrap();
        runtime.spawn(service.clone().serve_streams(listener, CancellationToken::new()));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
        runtime.spawn(Server::builder().add_service(service.grpc_server()).serve_with_incoming(incoming));
        Self { name, groups: groups.to_vec(), socket, address, gate, service, runtime: Some(runtime) }
    }

    /// As a member of this host, whom nothing else leads to.
    pub(crate) fn record(&self, fingerprint: &str) -> Member {
        let same_host = Some(SameHost { host: Auto.host().unwrap(), socket: self.socket.clone() });
        Member { same_host, ..member(&self.name, "http://127.0.0.1:1", &self.groups, fingerprint) }
    }

    /// As a member of another host.
    pub(crate) fn far(&self, fingerprint: &str) -> Member {
        member(&self.name, &self.address, &self.groups, fingerprint)
    }

    /// Pairs of rows and experts that it has computed.
    pub(crate) fn computed(&self) -> u64 {
        self.service.status().cells.iter().map(|cell| cell.rows).sum()
    }

    pub(crate) fn kill(&mut self) {
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.gate.open();
        self.kill();
    }
}

/// From now on holds up whichever of these replicas is asked; when polled, kills the first one while it computes.
pub(crate) fn lose_within_a_batch(shards: &mut [Shard]) -> impl Future<Output = ()> {
    let holds = |shard: &Shard| shard.gate.held.load(Ordering::SeqCst) > 0;
    shards.iter().for_each(|shard| shard.gate.shut());
    async move {
        until("the batch is under way", || shards.iter().any(holds)).await;
        let lost = shards.iter().position(holds).expect("one that holds");
        shards[lost].kill();
        shards.iter().enumerate().filter(|(index, _)| *index != lost).for_each(|(_, shard)| shard.gate.open());
    }
}

/// A caller with a device, and a dispatcher whose links to `shards` have pairs.
pub(crate) struct Caller {
    way: Way,
    pub(crate) device: Arc<Gpu>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) registry: Registry,
    /// Over one shard of this process.
    alone: Arc<Dispatcher>,
    _registrations: Vec<Box<dyn Registration>>,
}

impl Caller {
    /// Of shards of this host.
    pub(crate) async fn start(checkpoint: &Arc<Checkpoint>, shards: &[&Shard], rows_per_message: usize) -> Self {
        let records = shards.iter().map(|shard| shard.record(checkpoint.fingerprint())).collect();
        Self::by(Way::Ipc, checkpoint, records, rows_per_message).await
    }

    /// Of shards of other hosts.
    pub(crate) async fn far(checkpoint: &Arc<Checkpoint>, shards: &[&Shard], rows_per_message: usize) -> Self {
        let records = shards.iter().map(|shard| shard.far(checkpoint.fingerprint())).collect();
        Self::by(Way::Nccl, checkpoint, records, rows_per_message).await
    }

    pub(crate) async fn by(
        way: Way,
        checkpoint: &Arc<Checkpoint>,
        shards: Vec<Member>,
        rows_per_message: usize,
    ) -> Self {
        let (device, gate) = gpu(77);
        let (membership, registry) = (LocalMembership::new("test"), Registry::new());
        let mut registrations = Vec::new();
        for shard in shards {
            registrations.push(register(&membership, shard).await);
        }
        let pairs = Pairs::Required(pair_device(way, &device));
        let config = DispatchConfig {
            rows_per_message,
            hang_floor: Duration::from_millis(300),
            hedge_permille: 0,
            ..DispatchConfig::new(checkpoint.fingerprint())
        };
        let shards = RemoteShards::new(checkpoint.fingerprint(), LIMIT, Auto.host()).with_pairs(pairs);
        let shape = ModelShape::new(checkpoint).unwrap().unwrap();
        let dispatcher = Dispatcher::new(config.clone(), shape.clone(), &membership, Arc::new(shards), &registry);

        let whole = start(ExpertConfig::new("whole"), Arc::new(Cuda::new(Shim::new(1))), checkpoint, &ALL);
        let membership = LocalMembership::new("alone");
        registrations.push(register(&membership, member("whole", "", &ALL, checkpoint.fingerprint())).await);
        let link = Arc::new(InProcess([("whole".to_owned(), whole as Arc<dyn ShardLink>)].into()));
        let alone = Dispatcher::new(config, shape, &membership, link, &Registry::new());
        Self { way, device, gate, dispatcher, registry, alone, _registrations: registrations }
    }

    /// One layer, as attention would call it: with its rows on the board, where they fit.
    pub(crate) async fn layer(&self, seed: u64, rows: usize) -> Vec<u8> {
        let input = input(Dtype::Bf16, seed, rows);
        let mut x = values(seed, rows * HIDDEN);
        activation::round(Dtype::Bf16, &mut x);
        let published = self.device.publish(&self.device.load_vector(x).unwrap());
        assert_eq!(published.is_some(), rows <= ROWS);
        let output = match published {
            Some(published) => self.dispatcher.moe_published(input, published).await,
            None => self.dispatcher.moe(input).await,
        };
        output.unwrap().routed.to_vec()
    }

    /// The same where nothing goes wrong and nothing is shared.
    pub(crate) async fn expected(&self, seed: u64, rows: usize) -> Vec<u8> {
        self.alone.call(input(Dtype::Bf16, seed, rows)).await.unwrap().routed.to_vec()
    }

    pub(crate) async fn check(&self, seed: u64, rows: usize) {
        let found = timeout(LIMIT, self.layer(seed, rows)).await.expect("an answer in time");
        assert_eq!(found, self.expected(seed, rows).await, "layer {seed} of {rows} rows");
    }

    /// Batches that went by pairs and in messages.
    pub(crate) fn batches(&self) -> (u64, u64) {
        let text = metrics::render(&self.registry);
        let of = |payload: &str| {
            let series = format!("conclave_dispatch_batches_total{{payload=\"{payload}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&series)).map_or(0, |count| count.parse().unwrap())
        };
        (of(self.way.name()), of("messages"))
    }

    /// Sends layers until all batches of one go by pairs: links take a moment.
    pub(crate) async fn by_pairs(&self) {
        for seed in 5000.. {
            let before = self.batches();
            self.check(seed, ROWS).await;
            let after = self.batches();
            if after.1 == before.1 {
                return;
            }
            assert!(seed < 5000 + 2000, "{after:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

pub(crate) async fn until(what: &str, done: impl Fn() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("{what}"));
}
