//! The outgoing half of a connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::frame::{self, Kind, Payloads};

/// With more bytes than this unsent, a sender waits.
const MOST_UNSENT: usize = 64 << 20;
/// Pieces written by one call.
const PIECES: usize = 16;

/// Sends frames: at once as far as the socket takes them, the rest by the task of the connection ([`Sender::drain`]).
#[derive(Debug, Clone)]
pub struct Sender(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    stream: Arc<UnixStream>,
    unsent: Mutex<Unsent>,
    /// The task of the connection has something to write.
    more: Notify,
    /// Less is unsent than was.
    room: Notify,
}

#[derive(Debug, Default)]
struct Unsent {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    closed: bool,
}

impl Sender {
    pub(crate) fn new(stream: Arc<UnixStream>) -> Self {
        let (more, room) = (Notify::new(), Notify::new());
        Self(Arc::new(Shared { stream, unsent: Mutex::default(), more, room }))
    }

    fn lock(&self) -> MutexGuard<'_, Unsent> {
        self.0.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message; waits first while the other side does not read, and the connection's task writes. False: the
    /// connection is closed.
    pub(crate) async fn send<M: Payloads>(&self, message: M) -> bool {
        self.room().await;
        self.post(message)
    }

    /// Sends a message without waiting. False: the connection is closed.
    pub fn post<M: Payloads>(&self, message: M) -> bool {
        self.put(frame::encode(Kind::Message, message))
    }

    pub(crate) fn put(&self, frame: Vec<Bytes>) -> bool {
        let mut unsent = self.lock();
        if unsent.closed {
            return false;
        }
        let first = unsent.pieces.is_empty();
        unsent.bytes += frame.iter().map(Bytes::len).sum::<usize>();
        unsent.pieces.extend(frame);
        // Who finds something unsent leaves the order as it is.
        if first && unsent.write(&self.0.stream).is_err() {
            unsent.close();
        }
        let rest = !unsent.pieces.is_empty();
        drop(unsent);
        if rest {
            self.0.more.notify_one();
        }
        true
    }

    fn is_full(&self) -> bool {
        self.lock().bytes >= MOST_UNSENT
    }

    fn is_empty(&self) -> bool {
        self.lock().pieces.is_empty()
    }

    /// Waits until less is unsent.
    async fn room(&self) {
        loop {
            let room = self.0.room.notified();
            if !self.is_full() {
                return;
            }
            room.await;
        }
    }

    /// Writes until less is unsent.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn make_room(&self) -> io::Result<()> {
        self.write_while(Self::is_full).await
    }

    /// Writes all that is unsent.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn flush(&self) -> io::Result<()> {
        self.write_while(|sender| !sender.is_empty()).await
    }

    async fn write_while(&self, wanted: impl Fn(&Self) -> bool) -> io::Result<()> {
        while wanted(self) {
            self.0.stream.writable().await?;
            self.lock().write(&self.0.stream)?;
            self.0.room.notify_waiters();
        }
        Ok(())
    }

    /// Nothing is sent from now on.
    pub(crate) fn close(&self) {
        self.lock().close();
        self.0.room.notify_waiters();
    }

    /// Writes what the socket did not take at once, for as long as the connection lasts; to be polled by its task.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn drain(&self) -> io::Result<()> {
        loop {
            self.flush().await?;
            self.0.more.notified().await;
        }
    }
}

impl Unsent {
    /// As much as the socket takes.
    fn write(&mut self, stream: &UnixStream) -> io::Result<()> {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); PIECES];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                *slice = IoSlice::new(piece);
                count += 1;
            }
            match stream.try_write_vectored(&slices[..count]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(piece) = self.pieces.front_mut().filter(|_| written > 0) {
            let some = written.min(piece.len());
            piece.advance(some);
            written -= some;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    fn close(&mut self) {
        (self.closed, self.bytes) = (true, 0);
        self.pieces.clear();
    }
}
