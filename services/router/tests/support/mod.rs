//! A tokenizer of bytes, attention replicas that follow a script, a cluster view, and a router on loopback ports.
#![allow(dead_code, unused_imports)] // Each test binary uses its own part of this.

mod attention;
mod codec;
mod http;

use std::{sync::Arc, time::Duration};

use conclave_cluster::{ClusterView, Member, MemberState, Role};
use conclave_model::{GateMethod, ModelConfig, ModelKind, Scoring};
use conclave_proto::InstanceId;
use conclave_router::{
    ApiKeys, Defaults, Front, FrontConfig, NoLoad, RouterService, ServedModel, TextCodec, follow_readiness, serve_grpc,
    serve_http,
};
use conclave_serve::Readiness;
use prometheus::Registry;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) use attention::{Replica, Replicas, Script};
pub(crate) use codec::ByteCodec;
pub(crate) use http::Connection;

pub(crate) const FINGERPRINT: &str = "0123456789abcdef0123456789abcdef";
pub(crate) const MODEL: &str = "tiny";
/// Longest context of the model.
pub(crate) const CONTEXT: usize = 1000;

/// A router that serves on loopback until it is dropped.
pub(crate) struct Router {
    pub(crate) http: String,
    pub(crate) grpc: String,
    pub(crate) registry: Registry,
    pub(crate) replicas: Arc<Replicas>,
    pub(crate) view: watch::Sender<Arc<ClusterView>>,
    _stop: DropGuard,
}

/// What differs between tests.
pub(crate) struct Setup {
    pub(crate) config: FrontConfig,
    pub(crate) keys: ApiKeys,
    pub(crate) codec: Option<Arc<dyn TextCodec>>,
    /// Ready attention replicas: instance, numerics id, script.
    pub(crate) replicas: Vec<(&'static str, &'static str, Script)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            config: FrontConfig::default(),
            keys: ApiKeys::default(),
            codec: Some(Arc::new(ByteCodec)),
            replicas: vec![("a", "n1", Script::says("hello world"))],
        }
    }
}

impl Setup {
    /// One replica with a script.
    pub(crate) fn with(script: Script) -> Self {
        Self { replicas: vec![("a", "n1", script)], ..Self::default() }
    }

    pub(crate) async fn start(self) -> Router {
        let members = self.replicas.iter().map(|(name, numerics, _)| attention(name, numerics)).collect();
        let view = watch::Sender::new(view_of(members));
        let replicas = Arc::new(Replicas::new(self.replicas.into_iter().map(|(name, _, script)| (name, script))));
        let registry = Registry::new();
        let front =
            Front::new(self.config, model(self.codec), view.subscribe(), replicas.clone(), &registry).expect("valid");
        let readiness = Readiness::starting("the cluster");
        let stop = CancellationToken::new();
        tokio::spawn(follow_readiness(front.clone(), readiness.clone(), stop.clone()));
        let service =
            RouterService { front, load: Arc::new(NoLoad), keys: self.keys, readiness, registry: registry.clone() };
        let (http, grpc) = (listener().await, listener().await);
        let addresses = [&http, &grpc].map(|listener| listener.local_addr().expect("bound").to_string());
        let grace = Duration::from_millis(100);
        tokio::spawn(serve_http(http, service.http(), stop.clone(), grace));
        tokio::spawn(serve_grpc(grpc, service.grpc().expect("descriptions"), stop.clone(), grace));
        let [http, grpc] = addresses;
        Router { http, grpc: format!("http://{grpc}"), registry, replicas, view, _stop: stop.drop_guard() }
    }
}

impl Router {
    /// A metric's value, labels written as Prometheus writes them.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = conclave_serve::metrics::render(&self.registry);
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok()).unwrap_or(0.0)
    }
}

pub(crate) fn view_of(members: Vec<Member>) -> Arc<ClusterView> {
    Arc::new(ClusterView {
        cluster: "test".to_owned(),
        revision: 1,
        reachable: true,
        members,
        ..ClusterView::default()
    })
}

/// A ready attention replica.
pub(crate) fn attention(name: &str, numerics: &str) -> Member {
    Member {
        instance: InstanceId(name.to_owned()),
        role: Role::Attention,
        state: MemberState::Ready,
        address: format!("http://{name}.invalid:1"),
        same_host: None,
        cells: Vec::new(),
        fingerprint: FINGERPRINT.to_owned(),
        numerics: numerics.to_owned(),
        hosts_dispatch: false,
        since_ms: 1,
    }
}

/// A dense model: no expert groups to wait for.
pub(crate) fn model(text: Option<Arc<dyn TextCodec>>) -> ServedModel {
    let defaults = Defaults { temperature: Some(0.3), eos: vec![codec::EOS], ..Defaults::default() };
    ServedModel { name: MODEL.to_owned(), fingerprint: FINGERPRINT.to_owned(), config: config(), defaults, text }
}

pub(crate) fn config() -> ModelConfig {
    ModelConfig {
        kind: ModelKind::DeepseekV2,
        vocab: codec::VOCAB,
        hidden: 8,
        layers: 2,
        heads: 1,
        qk_nope: 4,
        qk_rope: 4,
        v_head: 4,
        kv_lora_rank: 4,
        q_lora_rank: None,
        intermediate: 8,
        routed_experts: None,
        shared_experts: None,
        moe_intermediate: 8,
        experts_per_token: 1,
        gate_groups: 1,
        gate_topk_groups: 1,
        gate_method: GateMethod::Greedy,
        scoring: Scoring::Softmax,
        norm_topk_prob: false,
        routed_scaling_factor: 1.0,
        first_k_dense: 0,
        moe_layer_freq: 1,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        max_position: CONTEXT,
        bos_token: Some(codec::BOS),
        eos_tokens: vec![codec::EOS],
        quantization: None,
    }
}

pub(crate) async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

/// Waits until something holds, for a few seconds at most.
pub(crate) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never came true: {what}");
}
