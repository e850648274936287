//! What a process writes about itself into the cluster.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};
use conclave_cluster::{EtcdConfig, EtcdMembership, Member, MemberState, Membership, Role, SameHost};
use conclave_model::Checkpoint;
use conclave_proto::InstanceId;
use conclave_serve::{State, args::ClusterArgs, listen::MemberListener};

use super::host::Host;

/// Joins the coordinator that the flags name, as soon as it answers. `None`: the process was told to end before.
///
/// # Errors
/// When it does not answer for as long as the flags say.
pub async fn connect(args: &ClusterArgs, host: &Host) -> Result<Option<Arc<dyn Membership>>> {
    host.readiness.set(State::Starting(format!("waiting for etcd at {}", args.etcd.join(", "))));
    let config = EtcdConfig::new(args.etcd.clone(), &args.cluster, args.lease_ttl);
    let config = EtcdConfig { patience: args.etcd_patience, ..config };
    let membership = tokio::select! {
        membership = EtcdMembership::connect(config) => membership?,
        () = host.stop.cancelled() => return Ok(None),
    };
    Ok(Some(Arc::new(membership)))
}

/// The address that others are told: as given, or the one listened on.
///
/// # Errors
/// When the process listens on all interfaces, as `flag` says, and no address is given.
pub fn advertised(args: &ClusterArgs, flag: &str, listening: SocketAddr) -> Result<String> {
    if let Some(address) = &args.advertise {
        return Ok(address.clone());
    }
    if listening.ip().is_unspecified() {
        bail!("--advertise: needed, since {flag} listens on all interfaces ({listening})");
    }
    Ok(format!("http://{listening}"))
}

/// Whether this process talks to members of its host over Unix sockets.
pub fn near(args: &ClusterArgs) -> bool {
    args.same_host == conclave_serve::same_host::SameHost::Auto
}

/// The way for members of the same host that a record offers.
pub fn same_host(args: &ClusterArgs, listener: &MemberListener) -> Option<SameHost> {
    let (host, socket) = (args.same_host.host()?, listener.socket()?.to_owned());
    Some(SameHost { host, socket })
}

/// A record in state loading, without cells.
pub fn record(instance: &str, role: Role, address: String, checkpoint: &Checkpoint, numerics: String) -> Member {
    Member {
        instance: InstanceId(instance.to_owned()),
        role,
        state: MemberState::Loading,
        address,
        same_host: None,
        cells: Vec::new(),
        fingerprint: checkpoint.fingerprint().to_owned(),
        numerics,
        hosts_dispatch: false,
        since_ms: since_epoch_ms(),
    }
}

fn since_epoch_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

/// An address that a person on this machine can use.
pub fn reachable(listening: SocketAddr) -> SocketAddr {
    match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(IpAddr::from([127, 0, 0, 1]), listening.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::new(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), listening.port())
        }
        _ => listening,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_all_interfaces_is_shown_as_loopback() {
        assert_eq!(reachable("0.0.0.0:80".parse().unwrap()), "127.0.0.1:80".parse().unwrap());
        assert_eq!(reachable("[::]:80".parse().unwrap()), "[::1]:80".parse().unwrap());
        assert_eq!(reachable("10.0.0.7:80".parse().unwrap()), "10.0.0.7:80".parse().unwrap());
    }
}
