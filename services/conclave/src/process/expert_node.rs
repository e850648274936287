//! An expert service with its device type forgotten.

use std::sync::Arc;

use anyhow::Result;
use conclave_cluster::MemberState;
use conclave_dispatch::ShardLink;
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::{Device, Fp8Weights};
use conclave_model::{Checkpoint, Progress};
use conclave_proto::CellId;
use conclave_serve::{Lane, metrics::Startup};
use futures::{FutureExt, future::BoxFuture};
use prometheus::Registry;
use tokio::sync::watch;
use tonic::service::Routes;

use super::{
    device::{AnyDevice, on_device},
    host::MemberService,
};

/// What a process has to do with its expert service.
pub struct ExpertNode {
    /// To compute in this process.
    pub link: Arc<dyn ShardLink>,
    /// To be served, on the lane.
    pub served: MemberService,
    /// Run by the compute thread.
    pub lane: Arc<Lane>,
    /// State of the service itself.
    pub state: watch::Receiver<MemberState>,
    drain: Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>,
}

impl ExpertNode {
    /// Loads the cells and checks them. Blocks.
    ///
    /// # Errors
    /// When weights cannot be read, do not fit, or compute nonsense.
    pub fn start(
        config: ExpertConfig,
        device: &AnyDevice,
        checkpoint: Arc<Checkpoint>,
        cells: &[CellId],
        registry: &Registry,
    ) -> Result<Self> {
        on_device!(device, device => Self::on(config, device.clone(), checkpoint, cells, registry))
    }

    /// The same, on one kind of device.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn on<D: Device>(
        config: ExpertConfig,
        device: Arc<D>,
        checkpoint: Arc<Checkpoint>,
        cells: &[CellId],
        registry: &Registry,
    ) -> Result<Self> {
        let startup = Startup::new(registry)?;
        let progress = Progress::new(move |done, total| startup.set("cells", done as f64 / total.max(1) as f64));
        let config = ExpertConfig { progress, ..config };
        let service = ExpertService::start(config, device, checkpoint, cells, registry)?;
        let (draining, streaming) = (service.clone(), service.clone());
        let served = MemberService {
            routes: Routes::new(service.grpc_server()),
            streams: Arc::new(move |listener, stop| streaming.clone().serve_streams(listener, stop).boxed()),
        };
        Ok(Self {
            served,
            lane: service.lane().clone(),
            state: service.state(),
            link: service,
            drain: Arc::new(move || {
                let service = draining.clone();
                Box::pin(async move { service.drain().await })
            }),
        })
    }

    /// Takes no new work; resolves when the work it has is done.
    pub async fn drain(&self) {
        (self.drain)().await;
    }
}

/// What becomes of weights in FP8 on a device.
pub fn fp8_weights(device: &AnyDevice) -> Fp8Weights {
    on_device!(device, device => device.fp8_weights())
}

/// Numerics id of a device.
pub fn numerics(device: &AnyDevice) -> String {
    on_device!(device, device => device.numerics())
}
