//! How a background task says that it cannot go on: by a message, or by ending without one.

use tokio::sync::watch;

/// Held by a background task; raised when the task ends without calling [`Alarm::disarm`], a panic included.
pub(super) struct Alarm {
    task: &'static str,
    failure: watch::Sender<Option<String>>,
    armed: bool,
}

impl Alarm {
    pub(super) fn new(task: &'static str, failure: watch::Sender<Option<String>>) -> Self {
        Self { task, failure, armed: true }
    }

    /// The task cannot go on.
    pub(super) fn raise(mut self, message: String) {
        self.armed = false;
        self.send(message);
    }

    /// The task ends as it should.
    pub(super) fn disarm(mut self) {
        self.armed = false;
    }

    /// The first failure stands.
    fn send(&self, message: String) {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(format!("{}: {message}", self.task));
            }
            first
        });
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if self.armed {
            self.send("ended unexpectedly".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_raises_the_alarm() {
        let failure = watch::Sender::new(None);
        let alarm = Alarm::new("watch", failure.clone());
        let task = tokio::spawn(async move {
            let _alarm = alarm;
            panic!("for the test");
        });
        assert!(task.await.is_err());
        assert_eq!(failure.borrow().as_deref(), Some("watch: ended unexpectedly"));
        Alarm::new("lease", failure.clone()).raise("late".into());
        assert_eq!(failure.borrow().as_deref(), Some("watch: ended unexpectedly"), "the first stands");
    }

    #[test]
    fn a_task_that_ends_as_it_should_raises_none() {
        let failure = watch::Sender::new(None);
        Alarm::new("lease", failure.clone()).disarm();
        assert_eq!(*failure.borrow(), None);
    }
}
