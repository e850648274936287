//! The checkpoint that a process serves.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result, bail};
use clap::Args;
use conclave_model::Checkpoint;

const DEMO: &str = "tests/fixtures/demo-model";

/// Which checkpoint.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Checkpoint: a directory, or org/name in the local Hugging Face cache [default: the bundled demo checkpoint].
    #[arg(long, env = "CONCLAVE_MODEL", value_name = "DIR|ORG/NAME")]
    pub model: Option<String>,
}

impl ModelArgs {
    /// The checkpoint's location: as given, or the demo checkpoint beside the current folder or the binary.
    ///
    /// # Errors
    /// When none is given and the demo checkpoint is not found.
    pub fn location(&self) -> Result<String> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        let beside_binary = std::env::current_exe().unwrap_or_default();
        let roots = std::iter::once(PathBuf::new()).chain(beside_binary.ancestors().skip(1).map(PathBuf::from));
        let found = roots.map(|root| root.join(DEMO)).find(|path| path.join("config.json").is_file());
        match found {
            Some(path) => Ok(path.display().to_string()),
            None => bail!("--model: none given, and the demo checkpoint {DEMO} is neither here nor beside the binary"),
        }
    }

    /// Opens and checks it.
    ///
    /// # Errors
    /// Naming what is wrong with it.
    pub async fn open(&self) -> Result<Arc<Checkpoint>> {
        let location = self.location()?;
        let checkpoint = tokio::task::spawn_blocking(move || Checkpoint::open(&location)).await??;
        tracing::info!(model = checkpoint.name(), fingerprint = checkpoint.fingerprint(), "checkpoint opened");
        Ok(Arc::new(checkpoint))
    }
}

/// Runs something that blocks (reading weights) away from the runtime.
pub async fn blocking<T: Send + 'static>(what: &str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.with_context(|| what.to_owned())?
}
