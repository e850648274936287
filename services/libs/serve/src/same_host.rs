//! What processes of one machine need to find each other without the network stack.
//!
//! A member listens on a Unix socket beside its port: of the abstract namespace, so that nothing is left of it when the
//! process dies, however it does. Its name has a random part: another process cannot have taken it before. Whether the
//! socket can be reached (same machine, same network namespace) is found out by connecting; who answers is found out by
//! the handshake, as it is over TCP.

use std::io;

use clap::ValueEnum;
use tokio::net::UnixListener;

use crate::id;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Whether the path for members of the same host is offered and used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum SameHost {
    /// Where a member can be reached over it; TCP elsewhere.
    #[default]
    Auto,
    /// TCP only.
    Off,
}

impl SameHost {
    /// Name of this host, for comparing with that of others; `None`: the path is not used.
    pub fn host(self) -> Option<String> {
        match self {
            Self::Auto => boot_id(),
            Self::Off => None,
        }
    }
}

/// Names this boot of this machine; containers on it share it.
fn boot_id() -> Option<String> {
    std::fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// Listens on a new abstract socket for `instance`; with the name to connect to.
///
/// # Errors
/// When the operating system has no such sockets.
pub fn listen(instance: &str) -> io::Result<(UnixListener, String)> {
    let name = format!("conclave/{instance}/{:016x}", id::random_u64()?);
    Ok((UnixListener::bind(path(&name))?, name))
}

/// What to bind to or connect to, for the name of a socket: a leading NUL means the abstract namespace.
pub fn path(name: &str) -> String {
    format!("\0{name}")
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_gone_with_its_listener() {
        let (listener, name) = listen("expert-0").unwrap();
        let (again, other) = listen("expert-0").unwrap();
        assert_ne!(name, other, "an id that is used again gets another socket");
        UnixStream::connect(path(&name)).await.unwrap();
        drop(listener);
        assert_eq!(UnixStream::connect(path(&name)).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(again);
    }

    #[test]
    fn a_host_has_one_name_unless_it_is_not_wanted() {
        assert!(SameHost::Auto.host().is_some());
        assert_eq!((SameHost::Auto.host(), SameHost::Off.host()), (boot_id(), None));
    }
}
