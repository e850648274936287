//! Calls into the operating system that the standard library does not have; the only `unsafe` of this crate.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// A file mapped for reading.
///
/// A file that is cut short while it is mapped ends the process (SIGBUS) when the lost pages are read: checkpoints
/// must be replaced, not written over.
#[derive(Debug)]
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps the whole of a file; costs address space, no memory.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the map is private to this type and only read. That nobody changes the file meanwhile cannot be
        // had from the operating system; the type's documentation demands it, and the fingerprint tells files apart.
        let map = unsafe { Mmap::map(file)? };
        Ok(Self(map))
    }

    /// Bytes `[begin, begin + count)` of the file.
    pub(crate) fn bytes(&self, begin: u64, count: u64) -> &[u8] {
        &self.0[begin as usize..(begin + count) as usize]
    }

    /// Has `[begin, begin + count)` read into the system's page cache, without waiting for it.
    pub(crate) fn will_need(&self, begin: u64, count: u64) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        self.0.advise_range(Advice::WillNeed, begin as usize, count as usize)
    }

    /// Gives back the memory that holds the pages of `[begin, begin + count)`; they are read again when next used.
    pub(crate) fn release(&self, begin: u64, count: u64) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        // SAFETY: dropping pages of a read-only map of a file loses nothing: the next read brings the same bytes.
        unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, begin as usize, count as usize) }
    }
}

/// Bytes that an ordinary user may still write to the disk of `path`.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut figures = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in NUL and `figures` has room for the structure; both outlive the call.
    if unsafe { libc::statvfs(path.as_ptr(), figures.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has filled the structure.
    let figures = unsafe { figures.assume_init() };
    Ok(figures.f_bavail.saturating_mul(figures.f_frsize))
}
