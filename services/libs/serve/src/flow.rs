//! Flow control of connections between members. A layer of 2048 rows is a message of 8 MiB: with the usual window of
//! 64 KiB it would go over in 128 pieces, each of which waits for the receiver to say that there is room again.

use tonic::transport::Server;

/// Bytes of one stream under way.
pub const STREAM_WINDOW: u32 = 32 << 20;
/// Bytes of one connection under way.
pub const CONNECTION_WINDOW: u32 = 64 << 20;
/// Bytes of one frame at most.
pub const FRAME: u32 = 256 << 10;

/// A server for other members.
pub fn member_server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
}
