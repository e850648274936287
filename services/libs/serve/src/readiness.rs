//! Whether a process may be sent work: one handle that the parts of a process set and the endpoints read.

use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

/// Where a process is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not ready yet, and what it does meanwhile.
    Starting(String),
    /// Takes work.
    Ready,
    /// Was ready; cannot take work until what it names is back.
    Waiting(String),
    /// Takes no new work, finishes what it has.
    Draining(String),
    /// Cannot go on.
    Failed(String),
}

impl State {
    /// The state in one word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Starting(_) => "starting",
            Self::Ready => "ready",
            Self::Waiting(_) => "waiting",
            Self::Draining(_) => "draining",
            Self::Failed(_) => "failed",
        }
    }

    /// Why, where the word alone does not say it.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Ready => None,
            Self::Starting(why) | Self::Waiting(why) | Self::Draining(why) | Self::Failed(why) => Some(why),
        }
    }

    /// States only move forward: what fails stays failed, what drains comes back no more.
    fn may_become(&self, next: &Self) -> bool {
        match self {
            Self::Failed(_) => false,
            Self::Draining(_) => matches!(next, Self::Failed(_)),
            Self::Ready | Self::Waiting(_) => !matches!(next, Self::Starting(_)),
            Self::Starting(_) => true,
        }
    }
}

/// As in `starting: loading weights`.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason() {
            Some(reason) => write!(f, "{}: {reason}", self.name()),
            None => f.write_str(self.name()),
        }
    }
}

/// A shared, watchable [`State`]. Clones show and set the same state.
#[derive(Debug, Clone)]
pub struct Readiness {
    state: Arc<watch::Sender<State>>,
}

impl Readiness {
    /// A process that starts with `what`.
    pub fn starting(what: impl Into<String>) -> Self {
        Self { state: Arc::new(watch::Sender::new(State::Starting(what.into()))) }
    }

    /// Moves to `next` and says whether it did: a failed or draining process does not become ready again.
    pub fn set(&self, next: State) -> bool {
        self.state.send_if_modified(|state| {
            let moves = *state != next && state.may_become(&next);
            if moves {
                *state = next;
            }
            moves
        })
    }

    /// The state now.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Whether the process takes work now.
    pub fn is_ready(&self) -> bool {
        *self.state.borrow() == State::Ready
    }

    /// The state, watched.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_moves_forward_only() {
        let readiness = Readiness::starting("loading weights");
        assert!(!readiness.is_ready());
        assert!(readiness.set(State::Ready));
        assert!(!readiness.set(State::Starting("again".into())));
        assert!(readiness.set(State::Waiting("no replica of cell 3".into())));
        assert!(readiness.set(State::Ready) && readiness.is_ready());
        assert!(readiness.set(State::Draining("SIGTERM".into())));
        assert!(!readiness.set(State::Ready), "a draining process stays so");
        assert!(readiness.set(State::Failed("lease lost".into())));
        assert!(!readiness.set(State::Draining("late".into())));
        assert_eq!(readiness.state().reason(), Some("lease lost"));
    }

    #[tokio::test]
    async fn watchers_see_changes_of_any_clone() {
        let readiness = Readiness::starting("loading weights");
        let mut watch = readiness.watch();
        readiness.clone().set(State::Ready);
        watch.changed().await.expect("the handle lives");
        assert_eq!(*watch.borrow_and_update(), State::Ready);
        assert!(!readiness.set(State::Ready), "no change, no wake-up");
        assert!(!watch.has_changed().expect("the handle lives"));
    }
}
