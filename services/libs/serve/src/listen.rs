//! Binding a port, with an error that says which one and why not.

use tokio::net::TcpListener;

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
