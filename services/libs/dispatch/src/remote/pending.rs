//! Who waits for which answer of a stream.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::time::Instant;

/// Waiters by key; closed with a reason when the stream ends.
#[derive(Debug)]
pub(super) struct Pending<K, V> {
    inner: Mutex<Inner<K, V>>,
}

#[derive(Debug)]
struct Inner<K, V> {
    waiters: HashMap<K, Waiter<V>>,
    closed: Option<String>,
}

#[derive(Debug)]
struct Waiter<V> {
    answer: oneshot::Sender<V>,
    /// When the other side last said that it is at it.
    sign: Option<Instant>,
}

/// A registered waiter; it is taken out when this is dropped.
#[derive(Debug)]
pub(super) struct Ticket<K: Hash + Eq + Copy, V> {
    pending: Arc<Pending<K, V>>,
    key: K,
    answer: oneshot::Receiver<V>,
}

impl<K: Hash + Eq + Copy, V> Pending<K, V> {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { inner: Mutex::new(Inner { waiters: HashMap::new(), closed: None }) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a waiter. The error says why the stream is closed, or that the key is taken.
    pub(super) fn register(self: &Arc<Self>, key: K) -> Result<Ticket<K, V>, String> {
        let mut inner = self.lock();
        if let Some(reason) = &inner.closed {
            return Err(reason.clone());
        }
        if inner.waiters.contains_key(&key) {
            return Err("the same work is under way on this stream".to_owned());
        }
        let (sender, answer) = oneshot::channel();
        inner.waiters.insert(key, Waiter { answer: sender, sign: None });
        Ok(Ticket { pending: self.clone(), key, answer })
    }

    /// Hands an answer over; one that nobody waits for is dropped.
    pub(super) fn answer(&self, key: &K, value: V) {
        let waiter = self.lock().waiters.remove(key);
        if let Some(waiter) = waiter {
            // A waiter that has gone away meanwhile has no use for it.
            let _ = waiter.answer.send(value);
        }
    }

    /// The other side is at it.
    pub(super) fn sign(&self, key: &K) {
        if let Some(waiter) = self.lock().waiters.get_mut(key) {
            waiter.sign = Some(Instant::now());
        }
    }

    /// When it last said so.
    pub(super) fn last_sign(&self, key: &K) -> Option<Instant> {
        self.lock().waiters.get(key)?.sign
    }

    /// Ends all waits.
    pub(super) fn close(&self, reason: String) {
        let mut inner = self.lock();
        inner.closed.get_or_insert(reason);
        inner.waiters.clear();
    }

    pub(super) fn closed(&self) -> Option<String> {
        self.lock().closed.clone()
    }
}

impl<K: Hash + Eq + Copy, V> Ticket<K, V> {
    /// The answer, or why there will be none.
    pub(super) async fn wait(&mut self) -> Result<V, String> {
        match (&mut self.answer).await {
            Ok(value) => Ok(value),
            Err(_) => Err(self.pending.closed().unwrap_or_else(|| "the stream ended".to_owned())),
        }
    }
}

impl<K: Hash + Eq + Copy, V> Drop for Ticket<K, V> {
    fn drop(&mut self) {
        self.pending.lock().waiters.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_find_their_waiters_and_late_ones_are_dropped() {
        let pending = Pending::<u32, &str>::new();
        let mut first = pending.register(1).unwrap();
        let second = pending.register(2).unwrap();
        assert!(pending.register(1).is_err(), "a key is taken once");
        drop(second);
        pending.answer(&2, "late");
        pending.answer(&1, "one");
        assert_eq!(first.wait().await, Ok("one"));
        assert!(pending.register(2).is_ok());
    }

    #[tokio::test]
    async fn signs_of_life_are_noted_and_end_no_wait() {
        let pending = Pending::<u32, &str>::new();
        let mut ticket = pending.register(1).unwrap();
        assert_eq!(pending.last_sign(&1), None);
        pending.sign(&1);
        pending.sign(&2);
        assert!(pending.last_sign(&1).is_some() && pending.last_sign(&2).is_none());
        pending.answer(&1, "one");
        assert_eq!((ticket.wait().await, pending.last_sign(&1)), (Ok("one"), None));
    }

    #[tokio::test]
    async fn closing_tells_everybody_why() {
        let pending = Pending::<u32, ()>::new();
        let mut ticket = pending.register(1).unwrap();
        pending.close("connection reset".to_owned());
        assert_eq!(ticket.wait().await, Err("connection reset".to_owned()));
        assert_eq!(pending.register(3).unwrap_err(), "connection reset");
    }
}
