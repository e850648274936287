//! Links between shims of two processes: a Unix socket without a file, whose name is the id.
//!
//! As with NCCL, a transfer ends only once both sides take part, and one without a deadline would wait for ever. Other than with
//! NCCL, sides that do not agree on the number of bytes are told.

use std::{
    io::{self, ErrorKind, Read, Write},
    ops::Range,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{CudaError, Driver, DriverLink, Launch, Shim, ShimMemory};
use crate::link::{LinkEnd, Until};

/// What an id begins with; a name follows.
const KIND: &str = "shim-link:";
/// How often a blocked call looks at its deadline.
const TICK: Duration = Duration::from_millis(1);
/// Bytes that are copied at a time.
const CHUNK: usize = 64 << 10;
/// Tells the sender that all has been received.
const RECEIVED: u8 = 1;

/// An id that no other link has.
pub(super) fn fresh_id() -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{KIND}conclave-{}-{number}", std::process::id()).into_bytes()
}

/// One end.
pub(super) struct ShimLink<'s> {
    shim: &'s Shim,
    stream: UnixStream,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> CudaError {
    move |error| CudaError::Device { what, detail: error.to_string() }
}

fn over(why: &'static str) -> io::Error {
    io::Error::new(ErrorKind::TimedOut, why)
}

impl<'s> ShimLink<'s> {
    /// Joins the link of this id.
    pub(super) fn join(shim: &'s Shim, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<Self, CudaError> {
        let failed = failed("join a link");
        let name = str::from_utf8(id).ok().and_then(|id| id.strip_prefix(KIND));
        let expected = || format!("found an id of {} bytes, expected {KIND}NAME", id.len());
        let name = name.ok_or_else(|| failed(io::Error::other(expected())))?;
        let address = SocketAddr::from_abstract_name(name).map_err(&failed)?;
        let stream = match end {
            LinkEnd::Maker => accept(&address, until),
            LinkEnd::Guest => connect(&address, until),
        };
        let ticking = |stream: UnixStream| {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(TICK))?;
            Ok(stream)
        };
        Ok(Self { shim, stream: stream.and_then(ticking).map_err(failed)? })
    }

    fn write(&mut self, mut bytes: &[u8], until: &Until<'_>) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = until.wait(|| some(self.stream.write(bytes), ErrorKind::WriteZero), over)?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    fn read(&mut self, bytes: &mut [u8], until: &Until<'_>) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            done += until.wait(|| some(self.stream.read(&mut bytes[done..]), ErrorKind::UnexpectedEof), over)?;
        }
        Ok(())
    }

    fn send_all(&mut self, memory: &ShimMemory, range: Range<usize>, until: &Until<'_>) -> io::Result<()> {
        self.write(&(range.len() as u64).to_le_bytes(), until)?;
        for start in range.clone().step_by(CHUNK) {
            let chunk = self.shim.fetch(&[(memory, start..range.end.min(start + CHUNK))]).map_err(io::Error::other)?;
            self.write(&chunk.concat(), until)?;
        }
        self.read(&mut [0], until)
    }

    fn receive_all(&mut self, memory: &ShimMemory, range: Range<usize>, until: &Until<'_>) -> io::Result<()> {
        let mut length = [0; 8];
        self.read(&mut length, until)?;
        let (found, expected) = (u64::from_le_bytes(length), range.len());
        if found != expected as u64 {
            let message = format!("the other end sends {found} bytes, expected {expected}");
            return Err(io::Error::new(ErrorKind::InvalidData, message));
        }
        for start in range.clone().step_by(CHUNK) {
            let mut chunk = vec![0; CHUNK.min(range.end - start)];
            self.read(&mut chunk, until)?;
            self.shim.upload(memory, start, &chunk).map_err(io::Error::other)?;
        }
        self.write(&[RECEIVED], until)
    }
}

/// How many bytes went; `None`: none until now. At the end of the stream, an error.
fn some(result: io::Result<usize>, at_end: ErrorKind) -> io::Result<Option<usize>> {
    match result {
        Ok(0) => Err(io::Error::new(at_end, "the other end is gone")),
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn accept(address: &SocketAddr, until: &Until<'_>) -> io::Result<UnixStream> {
    let listener = UnixListener::bind_addr(address)?;
    listener.set_nonblocking(true)?;
    let ask = || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    };
    until.wait(ask, over)
}

fn connect(address: &SocketAddr, until: &Until<'_>) -> io::Result<UnixStream> {
    let ask = || match UnixStream::connect_addr(address) {
        Ok(stream) => Ok(Some(stream)),
        // The other end is not there yet.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(None),
        Err(error) => Err(error),
    };
    until.wait(ask, over)
}

impl DriverLink<ShimMemory> for ShimLink<'_> {
    fn upload(&mut self, memory: &ShimMemory, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.shim.upload(memory, offset, bytes)
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.shim.launch(launch)
    }

    fn send(&mut self, memory: &ShimMemory, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        self.send_all(memory, range, until).map_err(failed("send over a link"))
    }

    fn receive(&mut self, memory: &ShimMemory, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        self.receive_all(memory, range, until).map_err(failed("receive over a link"))
    }
}
