//! An attention service with its device type forgotten, and its flags.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use async_trait::async_trait;
use clap::Args;
use conclave_attention::{
    AttentionConfig, AttentionError, AttentionService, CacheSize, sampler::TokenMask, scheduler::MicroBatches,
};
use conclave_dispatch::MoeLink;
use conclave_kernels::Device;
use conclave_model::{Checkpoint, Progress};
use conclave_proto::{
    InstanceId,
    v1::{AttentionStatus, SequenceRequest, TokenEvent},
};
use conclave_router::front::AttentionLink;
use conclave_serve::{Error, metrics::Startup};
use futures::{StreamExt, future::BoxFuture, stream::BoxStream};
use prometheus::Registry;
use tonic::service::Routes;

use super::{
    device::{AnyDevice, on_device},
    range::range,
};

/// How the attention service batches and caches.
#[derive(Debug, Clone, Args)]
pub struct AttentionArgs {
    /// Size of the latent cache in MiB; taken as it fills.
    #[arg(long, env = "CONCLAVE_CACHE_MIB", value_name = "MIB", default_value = "1024", value_parser = range::<u64>(1..=1 << 40))]
    pub cache_mib: u64,
    /// Keep no latents for other sequences with the same prefix.
    #[arg(long, env = "CONCLAVE_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Let bits depend on how rows come together where that is faster: prompts attend over expanded keys and values, and on a
    /// GPU products choose their tiles. Responses then say that they are not exact.
    #[arg(long, env = "CONCLAVE_NO_EXACT")]
    pub no_exact: bool,
    /// Sequences that run at the same time; more wait.
    #[arg(long, env = "CONCLAVE_MAX_RUNNING", value_name = "N", default_value = "64", value_parser = range::<usize>(1..=65_536))]
    pub max_running: usize,
    /// Sequences that may wait; more are refused.
    #[arg(long, env = "CONCLAVE_MAX_WAITING", value_name = "N", default_value = "256", value_parser = range::<usize>(0..=1_048_576))]
    pub max_waiting: usize,
    /// Tokens of one step at most, of all sequences together.
    #[arg(long, env = "CONCLAVE_STEP_TOKENS", value_name = "TOKENS", default_value = "512", value_parser = range::<usize>(1..=1_048_576))]
    pub step_tokens: usize,
    /// Tokens of one prompt in one step at most.
    #[arg(long, env = "CONCLAVE_PREFILL_CHUNK", value_name = "TOKENS", default_value = "512", value_parser = range::<usize>(1..=1_048_576))]
    pub prefill_chunk: usize,
    /// Time of a step, in milliseconds, while sequences decode: as many prompt tokens go along as are expected to fit into
    /// it, at least 64.
    #[arg(long, env = "CONCLAVE_STEP_TARGET", value_name = "MS", default_value = "250", value_parser = range::<u64>(0..=3_600_000))]
    pub step_target: u64,
    /// Micro-batches of a step that are under way together: of two, one computes while the rows of the other are with the
    /// routed experts, and weights are read twice. auto: two where that was measured to be faster; in one process, one.
    #[arg(long, env = "CONCLAVE_MICRO_BATCHES", value_name = "auto|1|2", default_value = "auto", value_parser = micro_batches)]
    pub micro_batches: MicroBatches,
}

fn micro_batches(value: &str) -> Result<MicroBatches, String> {
    match value {
        "auto" => Ok(MicroBatches::Auto),
        "1" => Ok(MicroBatches::One),
        "2" => Ok(MicroBatches::Two),
        _ => Err("expected auto, 1 or 2".to_owned()),
    }
}

impl AttentionArgs {
    /// Checks what the flags say against the device and the checkpoint, before weights are read.
    ///
    /// # Errors
    /// Naming the flag, what was found and what was expected.
    pub fn check(&self, context: Option<u32>, device: &AnyDevice, checkpoint: &Checkpoint) -> Result<()> {
        let config = self.config("attention", context, None);
        on_device!(device, device => config.size(&**device, checkpoint)).map_err(of_flag)?;
        Ok(())
    }

    /// Rows of a step at most.
    pub fn rows(&self) -> usize {
        self.step_tokens.max(self.max_running)
    }

    /// The settings of a service that samples no id but those `allowed`; `None`: all of the vocabulary.
    pub fn config(&self, instance: &str, context: Option<u32>, allowed: Option<TokenMask>) -> AttentionConfig {
        AttentionConfig {
            cache: CacheSize::Bytes(self.cache_mib << 20),
            prefix_cache: !self.no_prefix_cache,
            exact: !self.no_exact,
            max_running: self.max_running,
            max_waiting: self.max_waiting,
            step_tokens: self.rows(),
            prefill_chunk: self.prefill_chunk,
            step_target: Duration::from_millis(self.step_target),
            micro_batches: self.micro_batches,
            context_limit: context.map(|limit| limit as usize),
            allowed_tokens: allowed,
            ..AttentionConfig::new(InstanceId(instance.to_owned()))
        }
    }
}

/// A setting's error by the flag that it comes from.
fn of_flag(error: AttentionError) -> anyhow::Error {
    match error {
        AttentionError::Config { field, found, expected } => {
            let flag = match field {
                "cache" => "--cache-mib".to_owned(),
                "context_limit" => "--context".to_owned(),
                "max_running" | "step_tokens" | "prefill_chunk" => format!("--{}", field.replace('_', "-")),
                other => other.to_owned(),
            };
            anyhow!("{flag}: found {found}, expected {expected}")
        }
        AttentionError::NotExpanding { device } => anyhow!(
            "--no-exact: device {device} has no attention over expanded keys and values; leave --no-exact out, or compute \
             with --device cpu or cuda"
        ),
        error => error.into(),
    }
}

/// What a process has to do with its attention service.
pub struct AttentionNode {
    /// To run sequences in this process.
    pub link: Arc<dyn AttentionLink>,
    /// To be served.
    pub routes: Routes,
    drain: Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>,
}

impl AttentionNode {
    /// Loads the trunk. Blocks.
    ///
    /// # Errors
    /// When weights cannot be read or do not fit, or a bound makes no sense.
    pub fn start(
        config: AttentionConfig,
        device: &AnyDevice,
        checkpoint: Arc<Checkpoint>,
        moe: Arc<dyn MoeLink>,
        registry: &Registry,
    ) -> Result<Self> {
        on_device!(device, device => Self::on(config, device.clone(), checkpoint, moe, registry))
    }

    /// The same, on one kind of device.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn on<D: Device>(
        config: AttentionConfig,
        device: Arc<D>,
        checkpoint: Arc<Checkpoint>,
        moe: Arc<dyn MoeLink>,
        registry: &Registry,
    ) -> Result<Self> {
        let startup = Startup::new(registry)?;
        let progress = Progress::new(move |done, total| startup.set("trunk", done as f64 / total.max(1) as f64));
        let config = AttentionConfig { progress, ..config };
        let service = AttentionService::start(config, device, checkpoint, moe, registry).map_err(of_flag)?;
        let draining = service.clone();
        Ok(Self {
            routes: Routes::new(service.grpc_server()),
            link: Arc::new(InProcess(service)),
            drain: Arc::new(move || {
                let service = draining.clone();
                Box::pin(async move { service.drain().await })
            }),
        })
    }

    /// Takes no new sequences; resolves when those it has are done.
    pub async fn drain(&self) {
        (self.drain)().await;
    }
}

struct InProcess(Arc<AttentionService>);

#[async_trait]
impl AttentionLink for InProcess {
    async fn generate(&self, request: SequenceRequest) -> Result<BoxStream<'static, Result<TokenEvent, Error>>, Error> {
        Ok(self.0.generate(request)?.boxed())
    }

    async fn status(&self) -> Result<AttentionStatus, Error> {
        Ok(self.0.status())
    }
}
