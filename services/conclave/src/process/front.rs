//! The front role: flags, and the model as the API shows it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Result, bail};
use clap::{Args, builder::NonEmptyStringValueParser};
use conclave_model::Checkpoint;
use conclave_router::{
    ApiKeys, FrontConfig, ServedModel,
    front::{AttentionConnector, Front},
};
use prometheus::Registry;
use tokio::sync::watch;

use super::range::{YEAR, range};

/// The public API.
#[derive(Debug, Clone, Args)]
pub struct FrontArgs {
    /// Address of the OpenAI-compatible HTTP API, with /livez, /readyz, /health and /metrics.
    #[arg(long, env = "CONCLAVE_HTTP", value_name = "ADDR", default_value = "127.0.0.1:8000")]
    pub http: String,
    /// Address of the gRPC API.
    #[arg(long, env = "CONCLAVE_GRPC", value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub grpc: String,
    /// Name under which clients ask for the model [default: the checkpoint's own].
    #[arg(long, env = "CONCLAVE_MODEL_NAME", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub model_name: Option<String>,
    /// File of API keys, one a line; without it everybody may call.
    #[arg(long, env = "CONCLAVE_API_KEYS", value_name = "FILE")]
    pub api_keys: Option<PathBuf>,
    /// Longest context in tokens [default: the model's].
    #[arg(long, env = "CONCLAVE_CONTEXT", value_name = "TOKENS", value_parser = range::<u32>(1..=u32::MAX.into()))]
    pub context: Option<u32>,
    /// Sequences that may run at the same time; more are refused.
    #[arg(long, env = "CONCLAVE_MAX_SEQUENCES", value_name = "N", default_value = "4096", value_parser = range::<usize>(1..=1_048_576))]
    pub max_sequences: usize,
    /// Seconds after which a request that sets no deadline of its own ends.
    #[arg(long, env = "CONCLAVE_REQUEST_TIMEOUT", value_name = "SECONDS", default_value = "600", value_parser = range::<u64>(1..=YEAR))]
    pub request_timeout: u64,
}

impl FrontArgs {
    /// The keys of `--api-keys`.
    ///
    /// # Errors
    /// When the file cannot be read or holds no key.
    pub fn keys(&self) -> Result<ApiKeys> {
        Ok(match &self.api_keys {
            Some(path) => ApiKeys::load(path)?,
            None => ApiKeys::default(),
        })
    }

    /// The model of a checkpoint as the API shows it.
    ///
    /// # Errors
    /// When its tokenizer, template or generation config is broken, or its context shorter than the flags say.
    pub fn model(&self, checkpoint: &Checkpoint) -> Result<ServedModel> {
        let most = checkpoint.config().max_position;
        if let Some(asked) = self.context.filter(|asked| *asked as usize > most) {
            bail!("--context: found {asked}, expected 1 to the model's {most}");
        }
        let mut model = ServedModel::of(checkpoint)?;
        if let Some(name) = &self.model_name {
            model.name.clone_from(name);
        }
        if model.text.is_none() {
            tracing::warn!("no tokenizer.json: prompts are token ids only");
        }
        Ok(model)
    }

    /// The front of a model over the attention replicas in `view`.
    ///
    /// # Errors
    /// When a bound makes no sense.
    pub fn front(
        &self,
        model: ServedModel,
        view: watch::Receiver<Arc<conclave_cluster::ClusterView>>,
        connector: Arc<dyn AttentionConnector>,
        registry: &Registry,
    ) -> Result<Arc<Front>> {
        let config = FrontConfig {
            context_limit: self.context,
            max_sequences: self.max_sequences,
            default_timeout: Duration::from_secs(self.request_timeout),
            ..FrontConfig::default()
        };
        Ok(Front::new(config, model, view, connector, registry)?)
    }
}
