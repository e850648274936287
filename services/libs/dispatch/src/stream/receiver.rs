//! The incoming half of a connection.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::net::UnixStream;

use super::frame::{self, Frame, Parsed};

/// Room for short messages.
const BUFFER: usize = 64 << 10;

/// Reads frames.
#[derive(Debug)]
pub struct Receiver {
    stream: Arc<UnixStream>,
    buffer: BytesMut,
}

impl Receiver {
    pub(crate) fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(BUFFER) }
    }

    /// The next frame; `None` where the other side has ended the connection. Cancel-safe.
    ///
    /// # Errors
    /// When the connection breaks, ends within a frame, or what came is none.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            let missing = match frame::parse(&mut self.buffer) {
                Ok(Parsed::Frame(frame)) => return Ok(Some(frame)),
                Ok(Parsed::Missing(bytes)) => bytes,
                Err(message) => return Err(io::Error::new(io::ErrorKind::InvalidData, message)),
            };
            self.stream.readable().await?;
            if self.buffer.capacity() - self.buffer.len() < missing.min(BUFFER) || missing > BUFFER {
                self.buffer.reserve(missing.max(BUFFER));
            }
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}
