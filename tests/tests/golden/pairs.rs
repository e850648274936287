//! Rows and sums that go past the messages, from the trunk on: the demo checkpoint on the CUDA device on the shim.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use conclave_cluster::{
    CellChoice, CellShape, ClusterView, Loads, LocalMembership, Member, MemberState, Membership, Registration, Role,
    SameHost, choose,
};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, ModelShape, RemoteShards,
    pair::{BoardDevice, LinkDevice, PairDevice, Pairs, Way},
};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::{
    Device,
    cuda::{Cuda, Shim},
};
use conclave_model::Checkpoint;
use conclave_proto::InstanceId;
use conclave_serve::{
    metrics,
    same_host::{self, SameHost::Auto},
};
use conclave_tests::demo_model;
use prometheus::Registry;
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{bits, files::demo_sequences, system::System};

const SHARDS: u32 = 2;
/// Kernels on the shim are slow. The board has room for as many rows.
const LENGTH: usize = 8;

/// One device for all: it has the trunk's board.
fn device() -> Arc<Cuda<Shim>> {
    static DEVICE: OnceLock<Arc<Cuda<Shim>>> = OnceLock::new();
    DEVICE.get_or_init(|| Arc::new(Cuda::new(Shim::new(9)))).clone()
}

/// Experts, each served on a runtime of its own, which ends as a killed process does.
struct Experts {
    membership: LocalMembership,
    registrations: Vec<Box<dyn Registration>>,
    runtimes: Vec<Runtime>,
}

impl Experts {
    fn new() -> Self {
        Self { membership: LocalMembership::new("pairs"), registrations: Vec::new(), runtimes: Vec::new() }
    }

    /// One more with the cells of shard `index`, within this host or as on another, as rows and sums are to go.
    async fn add(&mut self, checkpoint: &Arc<Checkpoint>, index: u32, way: Way) {
        let groups = u32::try_from(checkpoint.config().cell_groups()).unwrap();
        let choice = CellChoice::Shard { index, of: SHARDS };
        let shape = CellShape { groups, spans: 1 };
        let cells = choose(&choice, shape, &ClusterView::default(), &Loads::new(), usize::MAX).unwrap();
        let name = format!("expert-{}", self.runtimes.len());
        let expert = ExpertConfig::new(&name);
        let service = ExpertService::start(expert, device(), checkpoint.clone(), &cells, &Registry::new()).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (mut address, mut socket) = ("http://127.0.0.1:1".to_owned(), None);
        match way {
            Way::Ipc => {
                let _inside = runtime.enter();
                let (listener, name) = same_host::listen(&name).unwrap();
                socket = Some(SameHost { host: Auto.host().unwrap(), socket: name });
                runtime.spawn(service.serve_streams(listener, CancellationToken::new()));
            }
            Way::Nccl => {
                let _inside = runtime.enter();
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                listener.set_nonblocking(true).unwrap();
                address = format!("http://{}", listener.local_addr().unwrap());
                let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
                runtime.spawn(Server::builder().add_service(service.grpc_server()).serve_with_incoming(incoming));
            }
        }
        let member = Member {
            instance: InstanceId(name),
            role: Role::Expert,
            state: MemberState::Ready,
            address,
            same_host: socket,
            cells,
            fingerprint: checkpoint.fingerprint().into(),
            numerics: device().numerics(),
            hosts_dispatch: false,
            since_ms: 0,
        };
        self.registrations.push(self.membership.register(Arc::new(move |_| Ok(member.clone()))).await.unwrap());
        self.runtimes.push(runtime);
    }

    fn dispatch(&self, checkpoint: &Checkpoint, way: Way) -> (Arc<Dispatcher>, Registry) {
        let (fingerprint, hidden, registry) = (checkpoint.fingerprint(), checkpoint.config().hidden, Registry::new());
        let pair_device: Arc<dyn PairDevice> = match way {
            Way::Ipc => Arc::new(BoardDevice::new(device(), LENGTH, hidden).unwrap()),
            Way::Nccl => Arc::new(LinkDevice::new(device(), LENGTH, hidden).unwrap()),
        };
        let shards = RemoteShards::new(fingerprint, Duration::from_secs(30), Auto.host())
            .with_pairs(Pairs::Required(pair_device));
        let shape = ModelShape::new(checkpoint).unwrap().unwrap();
        let config = DispatchConfig::new(fingerprint);
        let dispatch = Dispatcher::new(config, shape, &self.membership, Arc::new(shards), &registry);
        (dispatch, registry)
    }
}

impl Drop for Experts {
    fn drop(&mut self) {
        self.runtimes.drain(..).for_each(Runtime::shutdown_background);
    }
}

/// Batches that went this way.
fn batches(registry: &Registry, payload: &str) -> u64 {
    let series = format!("conclave_dispatch_batches_total{{payload=\"{payload}\"}} ");
    let text = metrics::render(registry);
    text.lines().find_map(|line| line.strip_prefix(&series)).map_or(0, |count| count.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trunks_rows_by_pairs_have_the_bits_of_messages() {
    let mut system = System::start(&demo_model(), device, 1).await;
    let checkpoint = system.checkpoint().clone();
    let ids = demo_sequences()[0].ids[..LENGTH].to_vec();
    let expected = bits(&system.logits(&ids, ids.len()).await);
    for way in [Way::Ipc, Way::Nccl] {
        let mut experts = Experts::new();
        for index in 1..=SHARDS {
            experts.add(&checkpoint, index, way).await;
        }
        let (dispatch, registry) = experts.dispatch(&checkpoint, way);
        // Until links are there, batches go in messages.
        assert_eq!(bits(&system.logits_by(dispatch.clone(), &ids).await), expected, "{way:?}");
        let before = (batches(&registry, way.name()), batches(&registry, "messages"));
        assert!(way == Way::Nccl || before.1 == 0, "none in messages: {before:?}");
        assert_eq!(bits(&system.logits_by(dispatch, &ids).await), expected, "{way:?}");
        let after = (batches(&registry, way.name()), batches(&registry, "messages"));
        assert!(after.0 > before.0 && after.1 == before.1, "{way:?}: {before:?}, then {after:?}");
    }

    // One of two experts for each cell, and the other while it serves.
    let mut experts = Experts::new();
    for index in [1, 2, 1, 2] {
        experts.add(&checkpoint, index, Way::Nccl).await;
    }
    let (dispatch, registry) = experts.dispatch(&checkpoint, Way::Nccl);
    assert_eq!(bits(&system.logits_by(dispatch.clone(), &ids).await), expected);
    let before = batches(&registry, "nccl");
    let (found, ()) = tokio::join!(system.logits_by(dispatch, &ids), async {
        while batches(&registry, "nccl") < before + 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let ended = experts.runtimes.remove(0);
        ended.shutdown_background();
    });
    assert_eq!(bits(&found), expected, "an expert killed");
}
