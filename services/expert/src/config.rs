//! Limits of the expert service.

use std::time::Duration;

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
    /// Callers of the same host with a device that shares memory get a pair, if this one does too.
    pub pairs: bool,
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
            pairs: true,
            progress: Progress::default(),
        }
    }
}
