//! Messages between members of the same host: framed, over a Unix socket. `stream.proto` says how.
//!
//! What gRPC does for a message of a few hundred bytes takes as long as the work that it asks for. Here a message is
//! written by who sends it, at once, and read by the task of the connection.

mod client;
mod frame;
mod receiver;
mod sender;
mod server;

pub(crate) use client::{Ending, Incoming, OpenError, Opened, open};
pub use frame::{Payloads, decode};
pub use receiver::Receiver;
pub use sender::Sender;
pub(crate) use server::without_pairs;
pub use server::{Caller, Event, Welcoming, serve};

/// Longest wait for the other side's part of the handshake.
pub(crate) const HANDSHAKE: std::time::Duration = std::time::Duration::from_secs(2);
