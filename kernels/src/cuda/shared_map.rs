//! Memory that shims of several processes share: a file without a name, which is gone with the last of them.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd},
    path::Path,
    ptr::NonNull,
};

use memmap2::MmapRaw;

use super::CudaError;

/// What a handle begins with; a path follows, at which the file can be opened while who made it lives.
const KIND: &[u8] = b"shim:";

/// The memory, mapped here.
#[derive(Debug)]
pub(super) struct SharedMap {
    map: MmapRaw,
    /// Held by who made it, so that the path leads to it.
    _file: File,
}

impl SharedMap {
    /// New memory of `bytes` zeros, and its handle.
    pub(super) fn new(bytes: usize) -> Result<(Self, Vec<u8>), CudaError> {
        let made = || {
            // SAFETY: makes a descriptor, or fails.
            let descriptor = unsafe { libc::memfd_create(c"conclave-shim".as_ptr(), libc::MFD_CLOEXEC) };
            if descriptor < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: just made, and owned by nobody else.
            let file = unsafe { File::from_raw_fd(descriptor) };
            file.set_len(bytes as u64)?;
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            Ok((Self { map: MmapRaw::map_raw(&file)?, _file: file }, [KIND, path.as_bytes()].concat()))
        };
        made().map_err(|error| CudaError::Memory { bytes, detail: error.to_string() })
    }

    /// Memory that a shim made.
    pub(super) fn open(handle: &[u8]) -> Result<Self, CudaError> {
        let refused = |detail: String| CudaError::Device { what: "open shared memory", detail };
        let path = handle.strip_prefix(KIND).and_then(|path| str::from_utf8(path).ok());
        let path =
            path.ok_or_else(|| refused(format!("found a handle of {} bytes, expected shim:PATH", handle.len())))?;
        let opened = || {
            let file = File::options().read(true).write(true).open(Path::new(path))?;
            Ok::<_, io::Error>(Self { map: MmapRaw::map_raw(&file)?, _file: file })
        };
        opened().map_err(|error| refused(format!("{path}: {error}")))
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).expect("a map lies somewhere")
    }

    pub(super) fn bytes(&self) -> usize {
        self.map.len()
    }
}
