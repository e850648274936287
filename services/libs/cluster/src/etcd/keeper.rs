//! Keeps a member's record in etcd for as long as its registration lives: one task owns the lease and all writes.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::Inner;
use super::alarm::Alarm;
use super::store::{Store, Written};
use crate::{ClusterError, ClusterView, Member, MemberState, Registration};

type Reply = oneshot::Sender<Result<(), ClusterError>>;

enum Command {
    SetState(MemberState, Reply),
    Leave(Reply),
}

/// The handle of a registered member.
pub(super) struct EtcdRegistration {
    record: watch::Receiver<Member>,
    commands: mpsc::Sender<Command>,
    /// Keeps the watch going, which the keeper listens to.
    inner: Arc<Inner>,
}

/// A record that was just written.
pub(super) struct Claimed {
    pub(super) member: Member,
    pub(super) lease: i64,
    pub(super) ttl: Duration,
}

impl EtcdRegistration {
    /// Starts to keep a record.
    pub(super) fn start(inner: Arc<Inner>, claimed: Claimed) -> Self {
        let (commands, receive) = mpsc::channel(4);
        let record = watch::Sender::new(claimed.member);
        let registration = Self { record: record.subscribe(), commands, inner };
        let inner = &registration.inner;
        let keeper = Keeper {
            store: inner.store.clone(),
            ttl: claimed.ttl,
            lease: Some(claimed.lease),
            written: true,
            reachable: true,
            record,
            view: inner.view.clone(),
        };
        tokio::spawn(keeper.run(receive, Alarm::new("registration", inner.failure.clone())));
        registration
    }

    async fn command(&self, make: impl FnOnce(Reply) -> Command) -> Result<(), ClusterError> {
        let (reply, answer) = oneshot::channel();
        let ended = || {
            let failure = self.inner.failure.borrow().clone();
            ClusterError::Protocol(failure.unwrap_or_else(|| "the registration has ended".to_owned()))
        };
        self.commands.send(make(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

#[async_trait]
impl Registration for EtcdRegistration {
    fn member(&self) -> Member {
        self.record.borrow().clone()
    }

    async fn set_state(&self, state: MemberState) -> Result<(), ClusterError> {
        self.command(|reply| Command::SetState(state, reply)).await
    }

    async fn leave(&self) -> Result<(), ClusterError> {
        self.command(Command::Leave).await
    }
}

struct Keeper {
    store: Store,
    ttl: Duration,
    lease: Option<i64>,
    /// Whether etcd has the record as it stands here, as far as is known.
    written: bool,
    /// Whether the last beat reached etcd: its loss is logged once.
    reachable: bool,
    record: watch::Sender<Member>,
    view: watch::Receiver<Arc<ClusterView>>,
}

impl Keeper {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, alarm: Alarm) {
        let mut beats = interval(self.ttl / 3);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let kept = tokio::select! {
                command = commands.recv() => match command {
                    None => return alarm.disarm(),
                    Some(Command::SetState(state, reply)) => self.set_state(state, reply).await,
                    Some(Command::Leave(reply)) => {
                        // Whoever asked may have stopped waiting.
                        let _ = reply.send(self.leave().await);
                        return alarm.disarm();
                    }
                },
                _ = beats.tick() => self.beat().await,
                () = missing(&mut self.view, &self.record) => {
                    self.written = false;
                    self.beat().await
                }
            };
            if let Err(error @ ClusterError::InstanceTaken { .. }) = kept {
                return alarm.raise(error.to_string());
            }
        }
    }

    /// Renews the lease and writes what is not written. What fails is tried again with the next beat.
    async fn beat(&mut self) -> Result<(), ClusterError> {
        let kept = self.keep().await;
        match &kept {
            Err(error) if self.reachable => tracing::warn!(%error, "registration cannot be kept; trying again"),
            Ok(()) if !self.reachable => tracing::info!("registration is kept again"),
            _ => {}
        }
        self.reachable = kept.is_ok();
        kept
    }

    async fn keep(&mut self) -> Result<(), ClusterError> {
        if let Some(lease) = self.lease
            && !self.store.renew(lease).await?
        {
            tracing::warn!("lease lost; registering again");
            (self.lease, self.written) = (None, false);
        }
        if self.written { Ok(()) } else { self.write().await }
    }

    async fn set_state(&mut self, state: MemberState, reply: Reply) -> Result<(), ClusterError> {
        self.record.send_modify(|member| member.state = state);
        self.written = false;
        let written = self.write().await;
        // Whoever asked may have stopped waiting.
        let _ = reply.send(written.clone());
        written
    }

    /// Writes the record, under a new lease where the old one is gone.
    async fn write(&mut self) -> Result<(), ClusterError> {
        for _ in 0..2 {
            let lease = self.lease().await?;
            match self.put(lease).await? {
                Written::Done => {
                    self.written = true;
                    return Ok(());
                }
                Written::Held(holder, _) => return Err(ClusterError::taken(&holder)),
                Written::NoLease => self.lease = None,
                Written::Changed => break,
            }
        }
        Err(ClusterError::Protocol(format!("record of {} does not stay", self.record.borrow().instance)))
    }

    /// Over the own record, or anew where it is gone.
    async fn put(&self, lease: i64) -> Result<Written, ClusterError> {
        let member = self.record.borrow().clone();
        if let Written::Done = self.store.replace(&member, lease, lease).await? {
            return Ok(Written::Done);
        }
        match self.store.create(&member, lease, None).await? {
            Written::Held(held, old) if (&held.address, held.since_ms) == (&member.address, member.since_ms) => {
                self.store.replace(&member, lease, old).await
            }
            other => Ok(other),
        }
    }

    async fn lease(&mut self) -> Result<i64, ClusterError> {
        if let Some(lease) = self.lease {
            return Ok(lease);
        }
        let (lease, _) = self.store.grant(self.ttl).await?;
        self.lease = Some(lease);
        Ok(lease)
    }

    /// Says that it leaves before it goes: others tell so from a record that was lost.
    async fn leave(&mut self) -> Result<(), ClusterError> {
        if self.record.borrow().state != MemberState::Leaving {
            self.record.send_modify(|member| member.state = MemberState::Leaving);
            self.written = false;
        }
        if !self.written {
            self.write().await?;
        }
        let lease = self.lease().await?;
        let member = self.record.borrow().clone();
        self.store.remove(&member, lease).await
    }
}

/// Waits until a reachable coordinator is seen to have lost the record.
async fn missing(view: &mut watch::Receiver<Arc<ClusterView>>, record: &watch::Sender<Member>) {
    let instance = record.borrow().instance.clone();
    let lost = |view: &Arc<ClusterView>| view.reachable && !view.is_verified(&instance);
    while view.changed().await.is_ok() {
        if lost(&view.borrow_and_update()) {
            return;
        }
    }
    // The watch has ended, which raises an alarm of its own; the beats go on.
    std::future::pending().await
}
