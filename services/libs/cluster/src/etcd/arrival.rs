//! Waiting for etcd at start: whoever starts a whole cluster at once starts etcd with it.

use std::time::Duration;

use tokio::time::Instant;

use super::store::{Snapshot, Store};
use crate::ClusterError;

/// What is there now; called for again while nobody answers, until `patience` is over.
///
/// # Errors
/// [`ClusterError::Unreachable`] with the last cause and the time waited; what etcd itself answers, at once.
pub(super) async fn first_snapshot(
    store: &Store,
    timeout: Duration,
    patience: Duration,
) -> Result<Snapshot, ClusterError> {
    let began = Instant::now();
    let (mut calls, limit) = calls(patience, timeout);
    let store = store.within(limit);
    loop {
        let (endpoints, message) = match store.snapshot().await {
            Err(ClusterError::Unreachable { endpoints, message }) => (endpoints, message),
            found => return found,
        };
        calls -= 1;
        if calls == 0 {
            let message = format!("{message}; gave up after {:.1} s", began.elapsed().as_secs_f64());
            return Err(ClusterError::Unreachable { endpoints, message });
        }
        let left = patience.saturating_sub(began.elapsed()).as_secs_f64();
        tracing::info!(etcd = endpoints, cause = message, "waiting for etcd, for {left:.0} s more at most");
    }
}

/// How many calls fill `patience`, one at least, and the limit of each: all the same, and no longer than `longest`.
fn calls(patience: Duration, longest: Duration) -> (u32, Duration) {
    if patience <= longest {
        return (1, if patience.is_zero() { longest } else { patience });
    }
    let calls = (patience.as_secs_f64() / longest.as_secs_f64()).ceil() as u32;
    (calls, patience / calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_fill_the_patience() {
        let of = |patience| {
            let (calls, limit) = calls(Duration::from_millis(patience), Duration::from_secs(3));
            (calls, limit.as_millis())
        };
        assert_eq!(of(0), (1, 3000), "one whole call");
        assert_eq!(of(1000), (1, 1000));
        assert_eq!(of(3000), (1, 3000));
        assert_eq!(of(4000), (2, 2000));
        assert_eq!(of(60_000), (20, 3000));
    }
}
