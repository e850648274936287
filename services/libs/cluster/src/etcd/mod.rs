//! Membership in etcd: a record under a lease, a watch, and the transactions that claim ids and cells.

mod alarm;
mod arrival;
mod keeper;
mod record;
mod store;
mod watcher;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use self::alarm::Alarm;
use self::keeper::{Claimed, EtcdRegistration};
use self::record::Keys;
use self::store::{Store, Written};
use self::watcher::Watcher;
use crate::roster::Roster;
use crate::{ClusterError, ClusterView, MakeMember, Member, Membership, Registration};

/// For how many lease times a member without a record is kept.
const KEEP_TTLS: u32 = 10;
/// How much longer than its lease a record of a dead process is waited for: etcd looks for expired leases now and then.
const EXPIRY_SLACK: Duration = Duration::from_secs(2);
/// Between two looks at a record that holds an id.
const HELD_PAUSE: Duration = Duration::from_millis(250);
/// How often a placement is decided anew because others claimed cells meanwhile.
const CONFLICTS: u32 = 200;

/// How to reach etcd, and for how long a silent member counts.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// `http://host:port` of one or more nodes.
    pub endpoints: Vec<String>,
    /// Name of the cluster: letters, digits, `.`, `_`, `-`.
    pub cluster: String,
    /// Time to live of a member's lease; whole seconds, and etcd grants no less than one and a half of its elections.
    pub ttl: Duration,
    /// Limit of one call, retries included.
    pub timeout: Duration,
    /// How long to go on calling at start while nobody answers; zero: for one call.
    pub patience: Duration,
}

impl EtcdConfig {
    /// The given places with a limit of three seconds a call, and no patience.
    pub fn new(endpoints: Vec<String>, cluster: &str, ttl: Duration) -> Self {
        let (timeout, patience) = (Duration::from_secs(3), Duration::ZERO);
        Self { endpoints, cluster: cluster.to_owned(), ttl, timeout, patience }
    }
}

/// A cluster whose members meet in etcd. Clones share one watch.
#[derive(Clone)]
pub struct EtcdMembership {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    ttl: Duration,
    view: watch::Receiver<Arc<ClusterView>>,
    failure: watch::Sender<Option<String>>,
    watcher: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl EtcdMembership {
    /// Reads the members, as soon as somebody answers, and begins to watch them.
    ///
    /// # Errors
    /// [`ClusterError::Unreachable`], naming the endpoints, when nobody answers for as long as the patience lasts; also when
    /// the cluster's name is not one.
    pub async fn connect(config: EtcdConfig) -> Result<Self, ClusterError> {
        let keys = Keys::new(&config.cluster)?;
        let store = Store::open(&config.endpoints, keys, config.timeout).await?;
        let snapshot = arrival::first_snapshot(&store, config.timeout, config.patience).await?;
        let roster = Roster::new(&config.cluster, config.ttl * KEEP_TTLS);
        let mut watcher = Watcher::new(store.clone(), roster, (config.ttl / 2).max(Duration::from_millis(500)));
        let revision = watcher.begin(snapshot);
        let view = watcher.subscribe();
        let failure = watch::Sender::new(None);
        let task = tokio::spawn(watcher.run(revision, Alarm::new("watch", failure.clone())));
        let inner = Inner { store, ttl: config.ttl, view, failure, watcher: task.abort_handle() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Waits until a background task cannot go on (somebody took the id over, or a task ended): the process must then
    /// become not ready, or end. An etcd that is away is no such failure.
    pub async fn failed(&self) -> ClusterError {
        let mut failure = self.inner.failure.subscribe();
        let message = match failure.wait_for(Option::is_some).await {
            Ok(message) => message.clone().unwrap_or_default(),
            Err(_) => "membership has ended".to_owned(),
        };
        ClusterError::Protocol(message)
    }

    /// Makes the record from what is there and writes it, again and again while others come in between.
    async fn claim(&self, make: &MakeMember, lease: i64, ttl: Duration) -> Result<Member, ClusterError> {
        let store = &self.inner.store;
        let patience = Instant::now() + ttl + EXPIRY_SLACK;
        let mut conflicts = 0;
        loop {
            let snapshot = store.snapshot().await?;
            let claims = snapshot.claims;
            let mut roster = Roster::new(&self.inner.view.borrow().cluster, Duration::ZERO);
            roster.snapshot(snapshot.revision, snapshot.members, std::time::Instant::now());
            let member = make(&roster.view())?;
            match store.create(&member, lease, Some(claims)).await? {
                Written::Done => return Ok(member),
                Written::Held(holder, _) if Instant::now() >= patience => return Err(ClusterError::taken(&holder)),
                Written::Held(holder, _) => {
                    tracing::debug!(instance = %holder.instance, address = %holder.address, "id held; waiting for its lease");
                    store.renew(lease).await?;
                    sleep(HELD_PAUSE).await;
                }
                Written::Changed if conflicts < CONFLICTS => {
                    conflicts += 1;
                    sleep(jitter()).await;
                }
                Written::Changed => {
                    return Err(ClusterError::Protocol(format!("cells were claimed {CONFLICTS} times meanwhile")));
                }
                Written::NoLease => return Err(ClusterError::Protocol("the lease ended while registering".to_owned())),
            }
        }
    }
}

/// 5 to 45 ms, so that those who met once do not meet again.
fn jitter() -> Duration {
    let random = conclave_serve::id::random_u64().unwrap_or_default();
    Duration::from_millis(5 + random % 40)
}

#[async_trait]
impl Membership for EtcdMembership {
    async fn register(&self, make: MakeMember) -> Result<Box<dyn Registration>, ClusterError> {
        let store = &self.inner.store;
        let (lease, ttl) = store.grant(self.inner.ttl).await?;
        match self.claim(&make, lease, ttl).await {
            Ok(member) => {
                let claimed = Claimed { member, lease, ttl };
                Ok(Box::new(EtcdRegistration::start(self.inner.clone(), claimed)))
            }
            Err(error) => {
                if let Err(error) = store.revoke(lease).await {
                    tracing::debug!(%error, "an unused lease is left to run out");
                }
                Err(error)
            }
        }
    }

    fn watch(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.inner.view.clone()
    }
}

#[cfg(test)]
mod tests;
