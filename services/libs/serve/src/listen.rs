//! Binding a port, with an error that says which one and why not; and where a member listens for others.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, UnixListener};

use crate::same_host;

/// The address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address}: {cause}")]
pub struct ListenError {
    /// As it was given.
    pub address: String,
    /// What the operating system or the resolver said.
    #[source]
    pub cause: std::io::Error,
}

/// Listens on `host:port`; port 0 takes a free one.
///
/// # Errors
/// When the address does not parse or resolve, is taken, or may not be bound.
pub async fn bind(address: &str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|cause| ListenError { address: address.to_owned(), cause })
}

/// Where a member listens for other members: a port, and a Unix socket for those of the same host.
#[derive(Debug)]
pub struct MemberListener {
    /// For everybody.
    pub tcp: TcpListener,
    /// For the same host, with its name.
    pub same_host: Option<(UnixListener, String)>,
}

impl MemberListener {
    /// Listens on `host:port`, and with `same_host` on a socket for that instance. Without such sockets the port has to
    /// do.
    ///
    /// # Errors
    /// As for [`bind`].
    pub async fn bind(address: &str, same_host: Option<&str>) -> Result<Self, ListenError> {
        let tcp = bind(address).await?;
        let same_host = same_host.and_then(|instance| {
            let listening = same_host::listen(instance);
            listening.inspect_err(|error| tracing::warn!(%error, "no Unix socket for members of this host")).ok()
        });
        Ok(Self { tcp, same_host })
    }

    /// The port.
    ///
    /// # Errors
    /// When the operating system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Name of the socket for the same host.
    pub fn socket(&self) -> Option<&str> {
        self.same_host.as_ref().map(|(_, name)| name.as_str())
    }

    /// The same on the runtime that runs there, where it is to be called.
    ///
    /// # Errors
    /// When a listener cannot be moved.
    pub fn moved(self) -> io::Result<impl FnOnce() -> io::Result<Self> + Send + 'static> {
        let tcp = self.tcp.into_std()?;
        let same_host = match self.same_host {
            Some((listener, name)) => Some((listener.into_std()?, name)),
            None => None,
        };
        Ok(move || {
            let same_host = match same_host {
                Some((listener, name)) => Some((UnixListener::from_std(listener)?, name)),
                None => None,
            };
            Ok(Self { tcp: TcpListener::from_std(tcp)?, same_host })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_cause() {
        let first = bind("127.0.0.1:0").await.expect("a free port");
        let address = first.local_addr().expect("an address").to_string();
        let error = bind(&address).await.expect_err("the port is taken");
        assert_eq!(error.cause.kind(), std::io::ErrorKind::AddrInUse);
        assert!(error.to_string().starts_with(&format!("listen on {address}: ")), "{error}");
    }

    #[tokio::test]
    async fn nonsense_is_refused() {
        let error = bind("no-port-here").await.expect_err("not an address");
        assert!(error.to_string().starts_with("listen on no-port-here: "), "{error}");
    }
}
