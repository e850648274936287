//! Limits of the expert service.

use std::time::Duration;

use conclave_dispatch::pair::Way;
use conclave_model::Progress;

/// How an expert process behaves.
#[derive(Debug, Clone)]
pub struct ExpertConfig {
    /// Id of this member; callers that mean another one are refused.
    pub instance: String,
    /// Rows of one batch at most.
    pub max_rows: usize,
    /// Rows that may wait; more are refused as overload.
    pub queue_rows: usize,
    /// Rows merged into one grouped FFN at most (a single batch may have more).
    pub merge_rows: usize,
    /// How often a caller that waits is told that its work is not forgotten.
    pub sign_every: Duration,
    /// Ways past the messages that callers are granted, if this device has them.
    pub pairs: Vec<Way>,
    /// Told about loading.
    pub progress: Progress,
}

impl ExpertConfig {
    /// The defaults, for one member.
    pub fn new(instance: impl Into<String>) -> Self {
        Self {
            instance: instance.into(),
            max_rows: 4096,
            queue_rows: 16_384,
            merge_rows: 2048,
            sign_every: Duration::from_millis(250),
            pairs: vec![Way::Ipc, Way::Nccl],
            progress: Progress::default(),
        }
    }
}
