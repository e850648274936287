//! gRPC connections that notice a dead peer.

use std::time::Duration;

use conclave_serve::flow;
use tonic::transport::{Channel, Endpoint};

/// A ping goes out this often, idle or not.
const PING_EVERY: Duration = Duration::from_secs(2);
/// Without an answer for this long the connection is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Messages of one stream that wait to be written.
pub(super) const QUEUE: usize = 64;

/// Connects to `address`.
///
/// # Errors
/// A sentence: the address cannot be read, or nobody answers there.
pub(super) async fn connect(address: &str, timeout: Duration) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(|error| format!("address {address:?}: {error}"))?
        .connect_timeout(timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(flow::STREAM_WINDOW)
        .initial_connection_window_size(flow::CONNECTION_WINDOW)
        .max_frame_size(flow::FRAME);
    endpoint.connect().await.map_err(|error| format!("{address}: {}", with_causes(&error)))
}

/// An error with what lies under it: the transport's own text says little.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
