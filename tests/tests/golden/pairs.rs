//! Rows and sums that go past the messages, from the trunk on: the demo checkpoint on the CUDA device on the shim.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use conclave_cluster::{
    CellChoice, CellShape, ClusterView, Loads, LocalMembership, Member, MemberState, Membership, Role, SameHost, choose,
};
use conclave_dispatch::{
    DispatchConfig, Dispatcher, ModelShape, RemoteShards,
    pair::{BoardDevice, Pairs},
};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::{
    Device,
    cuda::{Cuda, Shim},
};
use conclave_proto::InstanceId;
use conclave_serve::{
    metrics,
    same_host::{self, SameHost::Auto},
};
use conclave_tests::demo_model;
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use crate::{bits, files::demo_sequences, system::System};

const SHARDS: u32 = 2;
/// Kernels on the shim are slow. The board has room for as many rows.
const LENGTH: usize = 8;

/// One device for all: it has the trunk's board.
fn device() -> Arc<Cuda<Shim>> {
    static DEVICE: OnceLock<Arc<Cuda<Shim>>> = OnceLock::new();
    DEVICE.get_or_init(|| Arc::new(Cuda::new(Shim::new(9)))).clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trunks_rows_by_pairs_have_the_bits_of_messages() {
    let mut system = System::start(&demo_model(), device, 1).await;
    let checkpoint = system.checkpoint().clone();
    let (fingerprint, config) = (checkpoint.fingerprint(), checkpoint.config());
    let shape = CellShape { groups: u32::try_from(config.cell_groups()).unwrap(), spans: 1 };
    let (membership, registry) = (LocalMembership::new("pairs"), Registry::new());
    let mut registrations = Vec::new();
    for index in 1..=SHARDS {
        let choice = CellChoice::Shard { index, of: SHARDS };
        let cells = choose(&choice, shape, &ClusterView::default(), &Loads::new(), usize::MAX).unwrap();
        let name = format!("expert-{index}");
        let expert = ExpertConfig::new(&name);
        let service = ExpertService::start(expert, device(), checkpoint.clone(), &cells, &Registry::new()).unwrap();
        let (listener, socket) = same_host::listen(&name).unwrap();
        tokio::spawn(service.serve_streams(listener, CancellationToken::new()));
        let member = Member {
            instance: InstanceId(name),
            role: Role::Expert,
            state: MemberState::Ready,
            address: "http://127.0.0.1:1".into(),
            same_host: Some(SameHost { host: Auto.host().unwrap(), socket }),
            cells,
            fingerprint: fingerprint.into(),
            numerics: device().numerics(),
            hosts_dispatch: false,
            since_ms: 0,
        };
        registrations.push(membership.register(Arc::new(move |_| Ok(member.clone()))).await.unwrap());
    }
    let board = BoardDevice::new(device(), LENGTH, config.hidden).unwrap();
    let shards = RemoteShards::new(fingerprint, Duration::from_secs(30), Auto.host())
        .with_pairs(Pairs::Required(Arc::new(board)));
    let shape = ModelShape::new(system.checkpoint()).unwrap().unwrap();
    let dispatch = Dispatcher::new(DispatchConfig::new(fingerprint), shape, &membership, Arc::new(shards), &registry);

    let ids = demo_sequences()[0].ids[..LENGTH].to_vec();
    let by_pairs = system.logits_by(dispatch, &ids).await;
    assert_eq!(bits(&by_pairs), bits(&system.logits(&ids, ids.len()).await));
    let counted = metrics::render(&registry);
    let batches: Vec<&str> =
        counted.lines().filter(|line| line.starts_with("conclave_dispatch_batches_total{")).collect();
    assert!(matches!(batches[..], [one] if one.contains("ipc")), "none in messages: {batches:?}");
}
