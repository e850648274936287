//! Links: the devices of two processes, of one host or two, send each other what lies in their memory.
//!
//! A [`Link`] is one end, and belongs to one thread: each transfer takes that thread's time, and none of the device's queue.
//! What is sent must be there before, and what is received is there afterwards. [`Linked`] is such a thread.
//!
//! Both ends do the same transfers in the same order. An end that has met an error is of no use any more; when it goes, the
//! other one meets an error too, at once or when its patience is over.

mod thread;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::yield_now,
    time::{Duration, Instant},
};

pub use thread::{Ended, Linked, Transfer};

use crate::KernelError;

/// For so long whoever waits asks again and again, which is what most transfers take.
const BRISK: Duration = Duration::from_micros(200);
/// Afterwards, this often.
const PAUSE: Duration = Duration::from_micros(50);

/// Which end of a link: the two are told apart by who made the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkEnd {
    /// Of the device that made the id.
    Maker,
    /// Of the one that was told it.
    Guest,
}

/// How long to wait for the other end.
#[derive(Debug, Clone, Copy)]
pub struct Until<'a> {
    deadline: Instant,
    broken: &'a AtomicBool,
}

impl<'a> Until<'a> {
    /// For so long, unless `broken` is set before.
    pub fn new(limit: Duration, broken: &'a AtomicBool) -> Self {
        Self { deadline: Instant::now() + limit, broken }
    }

    /// Why one is not to wait any longer.
    pub fn over(&self) -> Option<&'static str> {
        match self.broken.load(Ordering::Acquire) {
            true => Some("it was broken off"),
            false => (Instant::now() >= self.deadline).then_some("the other end did not take part in time"),
        }
    }

    /// Asks until there is an answer.
    ///
    /// # Errors
    /// What the question meets, or `late` of why the wait is over.
    pub fn wait<T, E>(
        &self,
        mut ask: impl FnMut() -> Result<Option<T>, E>,
        late: impl FnOnce(&'static str) -> E,
    ) -> Result<T, E> {
        let begun = Instant::now();
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            if let Some(why) = self.over() {
                return Err(late(why));
            }
            if begun.elapsed() < BRISK { yield_now() } else { std::thread::sleep(PAUSE) }
        }
    }
}

/// One end of a link, over memory `S` of its device ([`Device::Shared`](crate::Device::Shared)).
pub trait Link<S> {
    /// Sends rows of the device's board, `[R, hidden]` in the activation type, by way of `through`.
    ///
    /// # Errors
    /// When there is no board, a row is not on it, `through` is smaller, or the transfer failed.
    fn send_rows(&mut self, rows: &[u32], hidden: usize, through: &S, until: &Until<'_>) -> Result<(), KernelError>;
    /// Sends the beginning of memory.
    ///
    /// # Errors
    /// When there is less of it, or the transfer failed.
    fn send(&mut self, memory: &S, bytes: usize, until: &Until<'_>) -> Result<(), KernelError>;
    /// Receives as many bytes as the other end sends into the beginning of memory.
    ///
    /// # Errors
    /// When there is less of it, or the transfer failed.
    fn receive(&mut self, memory: &S, bytes: usize, until: &Until<'_>) -> Result<(), KernelError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_an_answer_an_error_the_deadline_or_the_break() {
        let (broken, late) = (AtomicBool::new(false), |why: &'static str| why);
        let mut asked = 0;
        let third = || {
            asked += 1;
            Ok::<_, &str>((asked == 3).then_some(asked))
        };
        assert_eq!(Until::new(Duration::from_secs(60), &broken).wait(third, late), Ok(3));
        let never = || Ok::<Option<()>, _>(None);
        let soon = Until::new(Duration::from_millis(5), &broken);
        assert_eq!(soon.wait(never, late), Err("the other end did not take part in time"));
        assert_eq!(soon.wait(|| Err::<Option<()>, _>("lost"), late), Err("lost"));
        let long = Until::new(Duration::from_secs(60), &broken);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| long.wait(never, late));
            broken.store(true, Ordering::Release);
            assert_eq!(waiting.join().unwrap(), Err("it was broken off"));
        });
    }
}
