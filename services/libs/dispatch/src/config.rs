//! Limits and waits of dispatch.

use std::time::Duration;

/// How a dispatcher behaves.
#[derive(Debug, Clone)]
pub struct DispatchConfig {
    /// Fingerprint of the checkpoint; members with another one are not used.
    pub fingerprint: String,
    /// Numerics id to prefer; `None`: the one that covers most cells.
    pub numerics: Option<String>,
    /// Rows of one message to a shard at most; more are split.
    pub rows_per_message: usize,
    /// Rows of one layer call at most.
    pub max_rows: usize,
    /// A cell without a live replica for this long ends the call.
    pub no_replica_timeout: Duration,
    /// Longest layer call where the caller sets no budget.
    pub call_timeout: Duration,
    /// Longest wait for a connection to a shard.
    pub connect_timeout: Duration,
    /// Shortest wait before a hedge.
    pub hedge_floor: Duration,
    /// Calls out of a thousand that may be hedged.
    pub hedge_permille: u32,
    /// Shortest wait before a shard counts as hanging and its work goes to another in any case.
    pub hang_floor: Duration,
}

impl DispatchConfig {
    /// The defaults, for one checkpoint.
    pub fn new(fingerprint: impl Into<String>) -> Self {
        Self {
            fingerprint: fingerprint.into(),
            numerics: None,
            rows_per_message: 1024,
            max_rows: 16_384,
            no_replica_timeout: Duration::from_secs(30),
            call_timeout: Duration::from_secs(120),
            connect_timeout: Duration::from_secs(2),
            hedge_floor: Duration::from_millis(20),
            hedge_permille: 20,
            hang_floor: Duration::from_secs(1),
        }
    }
}
