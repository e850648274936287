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

type Gpu = Arc<Cuda<Shim>>;

/// One device for all of a test: it has the trunk's board.
fn device() -> Gpu {
    static DEVICE: OnceLock<Gpu> = OnceLock::new();
    DEVICE.get_or_init(|| Arc::new(Cuda::new(Shim::new(9)))).clone()
}

/// That of the second test.
fn second_device() -> Gpu {
    static DEVICE: OnceLock<Gpu> = OnceLock::new();
    DEVICE.get_or_init(|| Arc::new(Cuda::new(Shim::new(10)))).clone()
}

/// Experts, each served on a runtime of its own, which ends as a killed process does.
struct Experts {
    device: Gpu,
    membership: LocalMembership,
    registrations: Vec<Box<dyn Registration>>,
    runtimes: Vec<Runtime>,
}

impl Experts {
    fn new(device: Gpu) -> Self {
        Self { device, membership: LocalMembership::new("pairs"), registrations: Vec::new(), runtimes: Vec::new() }
    }

    /// One more with the cells of shard `index`, within this host or as on another, as rows and sums are to go.
    async fn add(&mut self, checkpoint: &Arc<Checkpoint>, index: u32, way: Way) {
        let groups = u32::try_from(checkpoint.config().cell_groups()).unwrap();
        let choice = CellChoice::Shard { index, of: SHARDS };
        let shape = CellShape { groups, spans: 1 };
        let cells = choose(&choice, shape, &ClusterView::default(), &Loads::new(), usize::MAX).unwrap();
        let name = format!("expert-{}", self.runtimes.len());
        let expert = ExpertConfig::new(&name);
        let service =
            ExpertService::start(expert, self.device.clone(), checkpoint.clone(), &cells, &Registry::new()).unwrap();
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
            numerics: self.device.numerics(),
            hosts_dispatch: false,
            since_ms: 0,
        };
        self.registrations.push(self.membership.register(Arc::new(move |_| Ok(member.clone()))).await.unwrap());
        self.runtimes.push(runtime);
    }

    fn dispatch(&self, checkpoint: &Checkpoint, way: Way) -> (Arc<Dispatcher>, Registry) {
        let (fingerprint, hidden, registry) = (checkpoint.fingerprint(), checkpoint.config().hidden, Registry::new());
        let pair_device: Arc<dyn PairDevice> = match way {
            Way::Ipc => Arc::new(BoardDevice::new(self.device.clone(), LENGTH, hidden).unwrap()),
            Way::Nccl => Arc::new(LinkDevice::new(self.device.clone(), LENGTH, hidden).unwrap()),
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
        let mut experts = Experts::new(device());
        for index in 1..=SHARDS {
            experts.add(&checkpoint, index, way).await;
        }
        let (dispatch, registry) = experts.dispatch(&checkpoint, way);
        system.dispatch_by(dispatch);
        assert_eq!(bits(&system.logits(&ids, LENGTH / 4).await), expected, "{way:?}");
        let (by_pair, in_messages) = (batches(&registry, way.name()), batches(&registry, "messages"));
        // Until links are there, batches go in messages.
        assert!(by_pair > 0 && (way == Way::Nccl || in_messages == 0), "{way:?}: {by_pair}, {in_messages} in messages");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expert_killed_while_it_serves_by_a_link_loses_nothing() {
    let mut system = System::start(&demo_model(), second_device, 1).await;
    let checkpoint = system.checkpoint().clone();
    let ids = demo_sequences()[0].ids[..LENGTH].to_vec();
    let expected = bits(&system.logits(&ids, ids.len()).await);
    let mut experts = Experts::new(second_device());
    for index in [1, 2, 1, 2] {
        experts.add(&checkpoint, index, Way::Nccl).await;
    }
    let (dispatch, registry) = experts.dispatch(&checkpoint, Way::Nccl);
    system.dispatch_by(dispatch);
    let (found, before) = tokio::join!(system.logits(&ids, 1), async {
        while batches(&registry, "nccl") < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        experts.runtimes.remove(0).shutdown_background();
        batches(&registry, "nccl")
    });
    assert_eq!(bits(&found), expected);
    assert!(batches(&registry, "nccl") > before, "the links with the others are as they were");
}
