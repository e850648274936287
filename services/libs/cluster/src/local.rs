//! Membership within one process: the same trait without a coordinator.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{ClusterError, ClusterView, MakeMember, Member, MemberState, Membership, Registration};

/// The members of one process. Clones are the same cluster.
#[derive(Debug, Clone)]
pub struct LocalMembership {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Held from reading the view to publishing its successor: that is the transaction.
    turn: Mutex<()>,
    view: watch::Sender<Arc<ClusterView>>,
}

impl LocalMembership {
    /// An empty cluster.
    pub fn new(cluster: &str) -> Self {
        let view = ClusterView { cluster: cluster.to_owned(), reachable: true, ..ClusterView::default() };
        let shared = Shared { turn: Mutex::new(()), view: watch::Sender::new(Arc::new(view)) };
        Self { shared: Arc::new(shared) }
    }
}

impl Shared {
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Arc<ClusterView> {
        self.view.borrow().clone()
    }

    /// Publishes the view changed by `change`; the caller holds the turn.
    fn publish(&self, change: impl FnOnce(&mut Vec<Member>)) {
        let mut view = ClusterView::clone(&self.now());
        view.revision += 1;
        change(&mut view.members);
        view.members.sort_by(|a, b| (a.role, &a.instance).cmp(&(b.role, &b.instance)));
        self.view.send_replace(Arc::new(view));
    }
}

#[async_trait]
impl Membership for LocalMembership {
    async fn register(&self, make: MakeMember) -> Result<Box<dyn Registration>, ClusterError> {
        let _turn = self.shared.turn();
        let view = self.shared.now();
        let member = make(&view)?;
        if let Some(holder) = view.member(&member.instance) {
            return Err(ClusterError::taken(holder));
        }
        self.shared.publish(|members| members.push(member.clone()));
        Ok(Box::new(LocalRegistration {
            shared: self.shared.clone(),
            member: Mutex::new(member),
            left: AtomicBool::new(false),
        }))
    }

    fn watch(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.shared.view.subscribe()
    }
}

/// A record in the view, which lives as long as this does.
struct LocalRegistration {
    shared: Arc<Shared>,
    member: Mutex<Member>,
    left: AtomicBool,
}

impl LocalRegistration {
    /// Removes the record once: afterwards the id may be another's.
    fn remove(&self) {
        let _turn = self.shared.turn();
        if !self.left.swap(true, Ordering::Relaxed) {
            let own = self.member().instance;
            self.shared.publish(|members| members.retain(|member| member.instance != own));
        }
    }
}

#[async_trait]
impl Registration for LocalRegistration {
    fn member(&self) -> Member {
        self.member.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn set_state(&self, state: MemberState) -> Result<(), ClusterError> {
        let _turn = self.shared.turn();
        let mut own = self.member.lock().unwrap_or_else(PoisonError::into_inner);
        own.state = state;
        if self.left.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.shared.publish(|members| {
            members.iter_mut().filter(|member| member.instance == own.instance).for_each(|m| m.clone_from(&own));
        });
        Ok(())
    }

    async fn leave(&self) -> Result<(), ClusterError> {
        self.remove();
        Ok(())
    }
}

impl Drop for LocalRegistration {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Role;
    use crate::member::fixture::expert;

    fn always(member: Member) -> MakeMember {
        Arc::new(move |_| Ok(member.clone()))
    }

    #[tokio::test]
    async fn members_come_change_and_go() {
        let cluster = LocalMembership::new("test");
        let mut watch = cluster.watch();
        let b = cluster.register(always(expert("b", &[2]))).await.expect("free");
        let a = cluster.register(always(expert("a", &[1]))).await.expect("free");
        let ids = |view: &ClusterView| view.members.iter().map(|m| m.instance.0.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&watch.borrow_and_update()), ["a", "b"]);

        a.set_state(MemberState::Leaving).await.expect("local");
        assert_eq!(a.member().state, MemberState::Leaving);
        assert!(watch.has_changed().expect("open"));
        assert_eq!(watch.borrow_and_update().ready(Role::Expert).count(), 1);

        a.leave().await.expect("local");
        assert_eq!(ids(&watch.borrow_and_update()), ["b"]);
        drop(b);
        assert!(watch.borrow_and_update().members.is_empty(), "a dropped registration ends its record");
    }

    #[tokio::test]
    async fn an_id_is_taken_until_its_holder_is_gone() {
        let cluster = LocalMembership::new("test");
        let first = cluster.register(always(expert("a", &[1]))).await.expect("free");
        let error = cluster.register(always(expert("a", &[2]))).await.err().expect("taken");
        assert!(matches!(error, ClusterError::InstanceTaken { .. }), "{error}");
        first.leave().await.expect("local");
        let second = cluster.register(always(expert("a", &[2]))).await.expect("free again");
        drop(first);
        // The old handle is dropped after the new one took the id over.
        assert_eq!(cluster.watch().borrow().members.len(), 1, "the new holder stays");
        drop(second);
    }

    #[tokio::test]
    async fn a_refused_record_leaves_nothing_behind() {
        let cluster = LocalMembership::new("test");
        let refuse: MakeMember = Arc::new(|_| Err(ClusterError::Placement("no".into())));
        assert!(cluster.register(refuse).await.is_err());
        assert!(cluster.watch().borrow().members.is_empty());
    }
}
