//! Steps whose routed experts failed: who ends, who runs again, and when.

use std::time::{Duration, Instant};

use conclave_serve::{Error, ErrorKind};

use super::{Ending, Engine};
use crate::sequence::Sequence;
use crate::trunk::Trunk;

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Pauses between failed steps, doubling.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    pub(super) fn over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn failed(&mut self, now: Instant) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(10)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause);
    }
}

impl<T: Trunk> Engine<T> {
    /// Gives up a step that began at `started`. What it wrote into the cache is written again, with the same bits.
    pub(super) fn cut(&mut self, shares: &[usize], error: &Error, started: Instant) {
        let now = Instant::now();
        tracing::warn!(%error, sequences = self.running.len(), "step cut");
        self.parts.metrics.cut_steps.inc();
        self.backoff.failed(now);
        let limit = self.parts.moe_retry_limit;
        let endings: Vec<Option<Ending>> = self
            .running
            .iter_mut()
            .zip(shares)
            .map(|(sequence, rows)| {
                (*rows > 0).then(|| verdict(sequence, error, Times { started, now, limit }).map(Err))?
            })
            .collect();
        self.leave(endings);
    }
}

struct Times {
    started: Instant,
    now: Instant,
    limit: Duration,
}

/// The error that a sequence ends with; `None`: it runs again.
fn verdict(sequence: &mut Sequence, error: &Error, times: Times) -> Option<Error> {
    if let Some(late) = sequence.late(times.now) {
        return Some(Error::new(late.kind, format!("{late}: {error}")));
    }
    if !may_pass(error.kind) {
        // Whatever it is, the request is not to blame: it was checked.
        return Some(Error::new(ErrorKind::Internal, error.message.clone()));
    }
    let stalled = *sequence.stalled_since.get_or_insert(times.started);
    let waited = times.now.saturating_duration_since(stalled);
    (sequence.deadline.is_none() && waited >= times.limit).then(|| {
        let message = format!("routed experts unreachable for {} ms: {error}", waited.as_millis());
        Error::new(ErrorKind::Unavailable, message)
    })
}

/// Whether the same step may succeed later.
fn may_pass(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::ResourceExhausted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_second() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        assert!(backoff.over(now));
        let pauses: Vec<u64> = (0..8)
            .map(|_| {
                backoff.failed(now);
                backoff.until().unwrap().duration_since(now).as_millis() as u64
            })
            .collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert!(!backoff.over(now) && backoff.over(now + LONGEST_PAUSE));
        backoff.reset();
        assert!(backoff.over(now));
    }
}
