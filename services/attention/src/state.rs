//! What the engine thread and the service both see.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use conclave_serve::{Error, ErrorKind};
use tokio::sync::watch;

/// Where the engine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Ready,
    /// Takes nothing new, finishes what it has.
    Leaving,
    /// The engine thread has ended.
    Stopped,
}

/// Shared figures. The engine writes them at step boundaries.
#[derive(Debug)]
pub(crate) struct State {
    open: watch::Sender<usize>,
    phase: Mutex<Phase>,
    stopped: watch::Sender<bool>,
    max_open: usize,
    pub(crate) running: AtomicU32,
    pub(crate) free_blocks: AtomicU32,
}

impl State {
    /// `max_open`: requests running and waiting at most.
    pub(crate) fn new(max_open: usize, free_blocks: u32) -> Arc<Self> {
        Arc::new(Self {
            open: watch::Sender::new(0),
            phase: Mutex::new(Phase::Ready),
            stopped: watch::Sender::new(false),
            max_open,
            running: AtomicU32::new(0),
            free_blocks: AtomicU32::new(free_blocks),
        })
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes nothing new from now on.
    pub(crate) fn leave(&self) {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Ready {
            *phase = Phase::Leaving;
        }
    }

    /// The engine thread has ended.
    pub(crate) fn stop(&self) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = Phase::Stopped;
        self.stopped.send_replace(true);
    }

    /// Lets a request in.
    ///
    /// # Errors
    /// When the service takes nothing new, or has as many requests as it may have.
    pub(crate) fn admit(self: &Arc<Self>) -> Result<Ticket, Error> {
        // Held until the request is counted: a drain that begins meanwhile then waits for it.
        let phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        match *phase {
            Phase::Ready => {}
            Phase::Leaving => {
                return Err(Error::new(ErrorKind::Unavailable, "attention: draining, takes no new request"));
            }
            Phase::Stopped => return Err(stopped()),
        }
        let admitted = self.open.send_if_modified(|open| {
            let room = *open < self.max_open;
            *open += usize::from(room);
            room
        });
        if admitted {
            return Ok(Ticket(Arc::clone(self)));
        }
        let message =
            format!("attention: found {0} requests running and waiting, expected fewer than {0}", self.max_open);
        Err(Error::new(ErrorKind::ResourceExhausted, message))
    }

    /// Requests running and waiting.
    pub(crate) fn open(&self) -> usize {
        *self.open.borrow()
    }

    /// Until no request is left or the engine has ended.
    pub(crate) async fn idle(&self) {
        let (mut open, mut stopped) = (self.open.subscribe(), self.stopped.subscribe());
        tokio::select! {
            _ = open.wait_for(|open| *open == 0) => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
    }

    /// Until the engine has ended.
    pub(crate) async fn stopped(&self) {
        // The sender is `self`: it cannot be gone.
        let _ = self.stopped.subscribe().wait_for(|stopped| *stopped).await;
    }

    pub(crate) fn show(&self, running: usize, free_blocks: usize) {
        let store = |to: &AtomicU32, value| to.store(u32::try_from(value).unwrap_or(u32::MAX), Ordering::Relaxed);
        store(&self.running, running);
        store(&self.free_blocks, free_blocks);
    }
}

/// The error of requests that a stopped engine leaves behind.
pub(crate) fn stopped() -> Error {
    Error::new(ErrorKind::Unavailable, "attention: the engine has stopped")
}

/// One admitted request; it counts until this is dropped.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<State>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admits_up_to_the_bound() {
        let state = State::new(2, 0);
        let first = state.admit().unwrap();
        let _second = state.admit().unwrap();
        let refused = state.admit().unwrap_err();
        assert_eq!(refused.kind, ErrorKind::ResourceExhausted);
        assert!(refused.message.contains("found 2 requests"), "{refused}");
        drop(first);
        assert_eq!(state.open(), 1);
        assert!(state.admit().is_ok());
    }

    #[tokio::test]
    async fn draining_refuses_and_waits_for_the_rest() {
        let state = State::new(2, 0);
        let ticket = state.admit().unwrap();
        state.leave();
        assert_eq!(state.admit().unwrap_err().kind, ErrorKind::Unavailable);
        let waiter = Arc::clone(&state);
        let idle = tokio::spawn(async move { waiter.idle().await });
        tokio::task::yield_now().await;
        assert!(!idle.is_finished());
        drop(ticket);
        idle.await.unwrap();
    }

    #[tokio::test]
    async fn a_stopped_engine_ends_waits_and_refuses() {
        let state = State::new(2, 0);
        let _ticket = state.admit().unwrap();
        state.stop();
        state.idle().await;
        state.stopped().await;
        state.leave();
        assert_eq!(state.phase(), Phase::Stopped);
        assert_eq!(state.admit().unwrap_err(), stopped());
    }
}
