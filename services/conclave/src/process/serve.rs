//! `conclave serve`: everything in one process, over the same parts and the same code as a cluster.

use std::{
    io::{self, Write},
    net::SocketAddr,
    time::Duration,
};

use anyhow::Result;
use clap::Args;
use conclave_cluster::Membership;
use conclave_router::{RouterService, front::ServedModel};
use conclave_serve::{State, args::LogArgs, listen, telemetry};

use super::{
    AttentionArgs, DeviceArgs, FrontArgs, ModelArgs,
    expert_node::fp8_weights,
    host::Host,
    in_process::{InProcess, SHARDS, Settings, Shown},
    member,
    range::range,
};

/// A request that is under way gets this long when the process is told to end.
const GRACE: Duration = Duration::from_secs(1);

/// Serve a model: everything in one process.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  conclave serve\n  conclave serve --model deepseek-ai/DeepSeek-V2-Lite-Chat --http 0.0.0.0:8000"
)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub front: FrontArgs,
    #[command(flatten)]
    pub attention: AttentionArgs,
    #[command(flatten)]
    pub log: LogArgs,
    /// Expert shards to run in this process, each with its part of the cells.
    #[arg(long, env = "CONCLAVE_SHARDS", value_name = "N", default_value = "1", value_parser = range::<u32>(SHARDS))]
    pub shards: u32,
}

/// Runs until told to end.
///
/// # Errors
/// Naming what could not be had: address, checkpoint, memory.
pub async fn run(args: ServeArgs) -> Result<()> {
    let guard = telemetry::init(&args.log.telemetry("conclave", "serve"))?;
    let ended = live(&args).await;
    guard.shutdown().await;
    ended
}

async fn live(args: &ServeArgs) -> Result<()> {
    let mut host = Host::new("serve", GRACE)?;
    let (device, keys) = (args.device.open()?, args.front.keys()?);
    let http = listen::bind(&args.front.http).await?;
    let grpc = listen::bind(&args.front.grpc).await?;
    let (http_address, grpc_address) = (http.local_addr()?, grpc.local_addr()?);
    let entrance = host.serve_entrance(http);
    let checkpoint = args.model.open().await?;
    checkpoint.check_memory(checkpoint.loaded_bytes(fp8_weights(&device)))?;
    let model = args.front.model(&checkpoint)?;
    args.attention.check(args.front.context, &device, &checkpoint)?;

    let (attention, context, shards) = (&args.attention, args.front.context, args.shards);
    let settings = Settings { model: &model, attention, context, shards };
    let shown = Shown { readiness: host.readiness.clone(), registry: host.registry.clone() };
    let parts = tokio::select! {
        parts = InProcess::start(settings, &shown, &device, &checkpoint) => parts?,
        () = host.stop.cancelled() => return host.end().await,
    };
    let (view, connector) = (parts.membership.watch(), parts.attention.clone());
    let front = args.front.front(model.clone(), view, connector, &host.registry)?;
    let (readiness, registry) = (host.readiness.clone(), host.registry.clone());
    let service = RouterService { front, load: parts.load.clone(), keys, readiness, registry };
    host.serve_front(service, &entrance, grpc)?;
    greet(&model, http_address, grpc_address);

    host.stop.cancelled().await;
    host.readiness.set(State::Draining("told to end".to_owned()));
    host.end().await
}

/// Prints what a newcomer does next.
fn greet(model: &ServedModel, http: SocketAddr, grpc: SocketAddr) {
    let (http, grpc) = (member::reachable(http), member::reachable(grpc));
    let body = if model.text.is_some() {
        format!(
            "http://{http}/v1/chat/completions -H 'content-type: application/json' -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"What is the capital of France?\"}}],\"temperature\":0}}'"
        )
    } else {
        format!(
            "http://{http}/v1/completions -H 'content-type: application/json' -d '{{\"prompt\":[1,2,3],\"max_tokens\":16}}'"
        )
    };
    let chat = match model.text.is_some() {
        true => format!("  conclave chat --url http://{http}/v1\n\n"),
        false => String::new(),
    };
    let ready = format!("\n{} is ready: http://{http} (OpenAI API), http://{grpc} (gRPC). Try:\n\n", model.name);
    // Nobody may be reading.
    let _ = io::stdout().write_all(format!("{ready}  curl -s {body}\n\n{chat}").as_bytes());
}
