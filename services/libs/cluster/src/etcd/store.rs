//! Calls to etcd: each bounded in time, repeated while the connection fails, with errors that name the endpoints.

use std::error::Error as _;
use std::future::Future;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
    WatchOptions, WatchStream,
};
use tokio::time::{Instant, sleep, timeout_at};

use super::record::{Keys, encode};
use crate::{ClusterError, Member, Role};

/// Between two attempts of one call.
const PAUSE: Duration = Duration::from_millis(100);

/// etcd, as one cluster's members see it.
#[derive(Clone)]
pub(super) struct Store {
    client: Client,
    pub(super) keys: Keys,
    endpoints: String,
    timeout: Duration,
}

/// Everything there is of a cluster, at one revision.
pub(super) struct Snapshot {
    pub(super) revision: i64,
    /// Revision of the last claim; 0 before the first.
    pub(super) claims: i64,
    pub(super) members: Vec<Member>,
}

/// How an attempt to write a record ended.
#[derive(Debug)]
pub(super) enum Written {
    /// It stands.
    Done,
    /// Another record has the id: the record and its lease.
    Held(Box<Member>, i64),
    /// Somebody claimed cells since the snapshot.
    Changed,
    /// The lease is gone.
    NoLease,
}

impl Store {
    /// Connects lazily: the first call finds out whether anybody is there.
    pub(super) async fn open(endpoints: &[String], keys: Keys, timeout: Duration) -> Result<Self, ClusterError> {
        let names = endpoints.join(",");
        let attempt = timeout / 2;
        let options = ConnectOptions::new()
            .with_connect_timeout(attempt)
            .with_timeout(attempt)
            .with_tcp_keepalive(Duration::from_secs(30))
            .with_require_leader(true);
        let client = Client::connect(endpoints, Some(options))
            .await
            .map_err(|error| ClusterError::Unreachable { endpoints: names.clone(), message: error.to_string() })?;
        Ok(Self { client, keys, endpoints: names, timeout })
    }

    /// The same with another limit of a call.
    pub(super) fn within(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    /// Everything of the cluster. Records that cannot be read are left out, with a warning.
    pub(super) async fn snapshot(&self) -> Result<Snapshot, ClusterError> {
        let root = self.keys.root();
        let answer = self
            .call("read members", || {
                let mut kv = self.client.kv_client();
                async move { kv.get(root, Some(GetOptions::new().with_prefix())).await }
            })
            .await?;
        let claims = self.keys.claims();
        let (marks, records): (Vec<_>, Vec<_>) =
            answer.kvs().iter().partition(|record| record.key() == claims.as_bytes());
        Ok(Snapshot {
            revision: answer.header().map_or(0, |header| header.revision()),
            claims: marks.first().map_or(0, |mark| mark.mod_revision()),
            members: records.into_iter().filter_map(|record| self.decode(record)).collect(),
        })
    }

    /// The member of a record; none, and a warning, where it cannot be read.
    pub(super) fn decode(&self, record: &KeyValue) -> Option<Member> {
        self.keys
            .decode(record.key(), record.value())
            .inspect_err(|error| tracing::warn!(%error, "record ignored"))
            .ok()
    }

    /// Writes a record under `lease` if no member of any role has its id and, for an expert whose place was decided from a
    /// snapshot, nobody claimed cells since.
    pub(super) async fn create(
        &self,
        member: &Member,
        lease: i64,
        claims: Option<i64>,
    ) -> Result<Written, ClusterError> {
        let keys: Vec<String> = Role::ALL.iter().map(|role| self.keys.member(*role, &member.instance)).collect();
        let mut when: Vec<Compare> =
            keys.iter().map(|key| Compare::create_revision(key.as_str(), CompareOp::Equal, 0)).collect();
        if let Some(revision) = claims.filter(|_| member.role == Role::Expert) {
            when.push(Compare::mod_revision(self.keys.claims(), CompareOp::Equal, revision));
        }
        let holders: Vec<TxnOp> = keys.iter().map(|key| TxnOp::get(key.as_str(), None)).collect();
        let txn = Txn::new().when(when).and_then(self.put(member, lease)?).or_else(holders);
        self.write(txn, lease).await
    }

    /// Writes a record under `lease` over the one that has lease `holder`.
    pub(super) async fn replace(&self, member: &Member, lease: i64, holder: i64) -> Result<Written, ClusterError> {
        let key = self.keys.member(member.role, &member.instance);
        let when = [Compare::lease(key.as_str(), CompareOp::Equal, holder)];
        let txn = Txn::new().when(when).and_then(self.put(member, lease)?).or_else([TxnOp::get(key, None)]);
        self.write(txn, lease).await
    }

    fn put(&self, member: &Member, lease: i64) -> Result<Vec<TxnOp>, ClusterError> {
        let key = self.keys.member(member.role, &member.instance);
        let mut puts = vec![TxnOp::put(key, encode(member)?, Some(PutOptions::new().with_lease(lease)))];
        if member.role == Role::Expert {
            puts.push(TxnOp::put(self.keys.claims(), member.instance.0.as_str(), None));
        }
        Ok(puts)
    }

    async fn write(&self, txn: Txn, lease: i64) -> Result<Written, ClusterError> {
        let sent = self.attempt("write record", || {
            let (mut kv, txn) = (self.client.kv_client(), txn.clone());
            async move { kv.txn(txn).await }
        });
        let answer = match sent.await {
            Ok(answer) => answer,
            Err(Failure::Etcd(error)) if is_not_found(&error) => return Ok(Written::NoLease),
            Err(failure) => return Err(self.error("write record", failure)),
        };
        if answer.succeeded() {
            return Ok(Written::Done);
        }
        for found in answer.op_responses() {
            let TxnOpResponse::Get(found) = found else { continue };
            let Some(holder) = found.kvs().first() else { continue };
            // An earlier attempt of this very write may have arrived although its answer did not.
            return Ok(match self.keys.decode(holder.key(), holder.value())? {
                _ if holder.lease() == lease => Written::Done,
                member => Written::Held(Box::new(member), holder.lease()),
            });
        }
        Ok(Written::Changed)
    }

    /// Removes a record, if it still is under `lease`, and the lease with it.
    pub(super) async fn remove(&self, member: &Member, lease: i64) -> Result<(), ClusterError> {
        let key = self.keys.member(member.role, &member.instance);
        let mut then = vec![TxnOp::delete(key.as_str(), None)];
        if member.role == Role::Expert {
            then.push(TxnOp::put(self.keys.claims(), member.instance.0.as_str(), None));
        }
        let txn = Txn::new().when([Compare::lease(key, CompareOp::Equal, lease)]).and_then(then);
        self.write(txn, lease).await?;
        self.revoke(lease).await
    }

    /// A new lease and the time that it was granted for.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<(i64, Duration), ClusterError> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let granted = self
            .call("grant lease", || {
                let mut leases = self.client.lease_client();
                async move { leases.grant(seconds, None).await }
            })
            .await?;
        Ok((granted.id(), Duration::from_secs(granted.ttl().unsigned_abs())))
    }

    /// Renews a lease; false when there is no such lease any more.
    pub(super) async fn renew(&self, lease: i64) -> Result<bool, ClusterError> {
        let sent = self.attempt("renew lease", || {
            let mut leases = self.client.lease_client();
            async move { leases.keep_alive(lease).await }
        });
        match sent.await {
            Ok(_) => Ok(true),
            Err(Failure::Etcd(etcd_client::Error::LeaseKeepAliveError(_))) => Ok(false),
            Err(Failure::Etcd(error)) if is_not_found(&error) => Ok(false),
            Err(failure) => Err(self.error("renew lease", failure)),
        }
    }

    /// Ends a lease and every record under it.
    pub(super) async fn revoke(&self, lease: i64) -> Result<(), ClusterError> {
        let sent = self.attempt("revoke lease", || {
            let mut leases = self.client.lease_client();
            async move { leases.revoke(lease).await }
        });
        match sent.await {
            Ok(_) => Ok(()),
            Err(Failure::Etcd(error)) if is_not_found(&error) => Ok(()),
            Err(failure) => Err(self.error("revoke lease", failure)),
        }
    }

    /// Events of all members from `revision` on.
    pub(super) async fn watch(&self, revision: i64) -> Result<WatchStream, ClusterError> {
        let members = self.keys.members();
        self.call("watch members", || {
            let (mut watch, members) = (self.client.watch_client(), members.as_str());
            let options = WatchOptions::new().with_prefix().with_start_revision(revision);
            async move { watch.watch(members, Some(options)).await }
        })
        .await
    }

    async fn call<T, F>(&self, what: &str, call: impl FnMut() -> F) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.attempt(what, call).await.map_err(|failure| self.error(what, failure))
    }

    /// Repeats `call` while the connection fails, until the time is over.
    async fn attempt<T, F>(&self, what: &str, mut call: impl FnMut() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let limit = Instant::now() + self.timeout;
        let mut last = None;
        while let Ok(answer) = timeout_at(limit, call()).await {
            match answer {
                Err(error) if is_transient(&error) => {
                    tracing::debug!(%error, what, "etcd call failed");
                    last = Some(error);
                }
                answer => return answer.map_err(Failure::Etcd),
            }
            if Instant::now() + PAUSE >= limit {
                break;
            }
            sleep(PAUSE).await;
        }
        Err(Failure::NoAnswer(last))
    }

    fn error(&self, what: &str, failure: Failure) -> ClusterError {
        let endpoints = self.endpoints.clone();
        match failure {
            Failure::NoAnswer(None) => {
                ClusterError::Unreachable { endpoints, message: format!("{what}: no answer within {:?}", self.timeout) }
            }
            Failure::NoAnswer(Some(error)) => {
                ClusterError::Unreachable { endpoints, message: format!("{what}: {}", describe(&error)) }
            }
            Failure::Etcd(error) => ClusterError::Protocol(format!("{endpoints}: {what}: {}", describe(&error))),
        }
    }
}

enum Failure {
    /// Nobody answered in time; what the last attempt met.
    NoAnswer(Option<etcd_client::Error>),
    /// etcd answered with an error.
    Etcd(etcd_client::Error),
}

fn is_transient(error: &etcd_client::Error) -> bool {
    use tonic::Code;
    match error {
        etcd_client::Error::IoError(_) | etcd_client::Error::TransportError(_) | etcd_client::Error::WatchError(_) => {
            true
        }
        etcd_client::Error::GRpcStatus(status) => matches!(
            status.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled | Code::Internal
        ),
        _ => false,
    }
}

fn is_not_found(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.code() == tonic::Code::NotFound)
}

/// The innermost cause, which is the one that helps: "connection refused" rather than "transport error".
fn describe(error: &etcd_client::Error) -> String {
    let etcd_client::Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut cause = status.source();
    while let Some(inner) = cause.and_then(|cause| cause.source()) {
        cause = Some(inner);
    }
    cause.map_or_else(|| status.message().to_owned(), |cause| format!("{}: {cause}", status.message()))
}
