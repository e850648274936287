//! Links between the GPUs of two processes: communicators of NCCL with two ranks each.
//!
//! They do not block: a call begins something, and is asked how far that has come. So whoever waits can stop waiting. A
//! communicator belongs to the thread that made it, and is aborted when it goes, with all that is under way on it.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ops::Range,
    ptr,
    sync::{Arc, OnceLock},
};

use cudarc::{
    driver::{CudaStream, DriverError, result, sys::CUevent_flags},
    nccl::sys::{self, ncclComm_t, ncclDataType_t, ncclResult_t},
};

use super::{CudaError, Driver, DriverLink, Gpu, GpuMemory, Launch, gpu::device};
use crate::link::{LinkEnd, Until};

const ID: usize = size_of::<sys::ncclUniqueId>();
/// `NCCL_CONFIG_INITIALIZER` of nccl.h, and the version whose fields are filled in: later ones take it as it is.
const MAGIC: u32 = 0xcafe_beef;
const VERSION: u32 = 22_200;
const UNDEFINED: c_int = c_int::MIN;
/// Blocks of the GPU that a link keeps busy while it waits: its other end may wait for kernels of the same GPU.
const MOST_BLOCKS: c_int = 4;

const JOIN: &str = "join a link by NCCL";
const SEND: &str = "send over a link by NCCL";
const RECEIVE: &str = "receive over a link by NCCL";

/// An id that no other link has. Something of this process waits from now on for both ends to join.
pub(super) fn fresh_id() -> Result<Vec<u8>, CudaError> {
    check_present()?;
    let mut id = sys::ncclUniqueId { internal: [0; ID] };
    // SAFETY: the library is there, and writes the id.
    let made = unsafe { sys::ncclGetUniqueId(&mut id) };
    progress("make an id for a link by NCCL", made, ptr::null_mut())?;
    Ok(bytemuck::cast_slice(&id.internal).to_vec())
}

/// Says what is missing: calls into a library that is not there end in a panic.
pub(super) fn check_present() -> Result<(), CudaError> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: only opens and closes the library.
    if *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Ok(());
    }
    let detail = "no such library is in LD_LIBRARY_PATH or the system's folders (NCCL may be there as libnccl.so.2: a link \
                  of that name to it does)";
    Err(CudaError::Missing { missing: "libnccl.so", detail: detail.to_owned() })
}

/// Whether what a call began has ended, as its result or that of asking later says.
fn progress(what: &'static str, result: ncclResult_t, communicator: ncclComm_t) -> Result<bool, CudaError> {
    match result {
        ncclResult_t::ncclSuccess => Ok(true),
        ncclResult_t::ncclInProgress => Ok(false),
        failed => {
            // SAFETY: texts that live as long as the library, or null.
            let text = |text: *const c_char| match text.is_null() {
                true => String::new(),
                false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
            };
            // SAFETY: the library is there; both take any value.
            let (kind, last) = unsafe { (sys::ncclGetErrorString(failed), sys::ncclGetLastError(communicator)) };
            let (kind, last) = (text(kind), text(last));
            let detail = if last.is_empty() { kind } else { format!("{kind}: {last}") };
            Err(CudaError::Device { what, detail })
        }
    }
}

/// A communicator of two ranks.
struct Communicator(ncclComm_t);

impl Communicator {
    /// Begins to join.
    fn join(id: &[u8], rank: c_int) -> Result<Self, CudaError> {
        let refused =
            || CudaError::Device { what: JOIN, detail: format!("found an id of {} bytes, expected {ID}", id.len()) };
        let id: [u8; ID] = id.try_into().map_err(|_| refused())?;
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: MAGIC,
            version: VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: MOST_BLOCKS,
            netName: ptr::null(),
            splitShare: UNDEFINED,
        };
        let (id, mut communicator) = (sys::ncclUniqueId { internal: bytemuck::cast(id) }, Self(ptr::null_mut()));
        // SAFETY: the library is there, as the caller saw to; it copies the configuration and writes the communicator.
        let begun = unsafe { sys::ncclCommInitRankConfig(&mut communicator.0, 2, id, rank, &mut config) };
        progress(JOIN, begun, communicator.0)?;
        Ok(communicator)
    }

    /// Waits until what was begun has been queued, or done where it is no work of the GPU.
    fn settle(&self, what: &'static str, until: &Until<'_>) -> Result<(), CudaError> {
        until.wait(|| Ok(self.ask(what)?.then_some(())), |why| late(what, why))
    }

    fn ask(&self, what: &'static str) -> Result<bool, CudaError> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: a communicator that lives; writes its state.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.0, &mut state) };
        progress(what, asked, self.0)?;
        progress(what, state, self.0)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        // SAFETY: a communicator that lives, and is not used any more.
        let aborted = unsafe { sys::ncclCommAbort(self.0) };
        if let Err(error) = progress("abort a link by NCCL", aborted, ptr::null_mut()) {
            tracing::warn!(%error, "a link is left behind");
        }
    }
}

fn late(what: &'static str, why: &'static str) -> CudaError {
    CudaError::Device { what, detail: why.to_owned() }
}

/// One end.
pub(super) struct NcclLink<'g> {
    gpu: &'g Gpu,
    communicator: Communicator,
    stream: Arc<CudaStream>,
    /// Rank of the other end.
    peer: c_int,
}

impl<'g> NcclLink<'g> {
    /// Joins the link of this id. Once each end has heard of the other, all connections are there.
    pub(super) fn join(gpu: &'g Gpu, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<Self, CudaError> {
        check_present()?;
        gpu.device.bind()?;
        let stream = first_stream(gpu).map_err(|error| device("make a CUDA stream", &error))?;
        let (rank, peer) = match end {
            LinkEnd::Maker => (0, 1),
            LinkEnd::Guest => (1, 0),
        };
        let communicator = Communicator::join(id, rank)?;
        communicator.settle(JOIN, until)?;
        let mut link = Self { gpu, communicator, stream, peer };
        let word = gpu.allocate(1)?;
        match end {
            LinkEnd::Maker => link.send(&word, 0..1, until).and_then(|()| link.receive(&word, 0..1, until)),
            LinkEnd::Guest => link.receive(&word, 0..1, until).and_then(|()| link.send(&word, 0..1, until)),
        }?;
        Ok(link)
    }

    /// Waits until a transfer that was begun has ended.
    fn finish(&self, what: &'static str, begun: ncclResult_t, until: &Until<'_>) -> Result<(), CudaError> {
        progress(what, begun, self.communicator.0)?;
        self.communicator.settle(what, until)?;
        let failed = |error: DriverError| device(what, &error);
        let end = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING)).map_err(failed)?;
        let ask = || {
            self.communicator.ask(what)?;
            Ok(end.try_is_complete().map_err(failed)?.then_some(()))
        };
        until.wait(ask, |why| late(what, why))
    }
}

/// A stream whose kernels go before those of others.
fn first_stream(gpu: &Gpu) -> Result<Arc<CudaStream>, DriverError> {
    let (_, first) = result::stream::get_priority_range()?;
    gpu.device.context.new_stream_with_priority(first)
}

impl DriverLink<GpuMemory> for NcclLink<'_> {
    fn upload(&mut self, memory: &GpuMemory, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        let to = memory.at(offset..offset + bytes.len());
        self.gpu.device.bind()?;
        // SAFETY: inside the memory, as checked by `at`. Bytes that are not pinned have been read when the call returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }
            .map_err(|error| device("copy to the GPU", &error))
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.gpu.launch_on(&self.stream, launch)
    }

    fn send(&mut self, memory: &GpuMemory, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        let (from, bytes) = (memory.at(range.clone()) as *const c_void, range.len());
        self.gpu.device.bind()?;
        let (kind, stream) = (ncclDataType_t::ncclUint8, self.stream.cu_stream().cast());
        // SAFETY: inside the memory, as checked by `at`; when memory goes, it waits for what the GPU is at, and this link,
        // which the caller gives up after an error, aborts that.
        let begun = unsafe { sys::ncclSend(from, bytes, kind, self.peer, self.communicator.0, stream) };
        self.finish(SEND, begun, until)
    }

    fn receive(&mut self, memory: &GpuMemory, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        let (to, bytes) = (memory.at(range.clone()) as *mut c_void, range.len());
        self.gpu.device.bind()?;
        let (kind, stream) = (ncclDataType_t::ncclUint8, self.stream.cu_stream().cast());
        // SAFETY: as in `send`.
        let begun = unsafe { sys::ncclRecv(to, bytes, kind, self.peer, self.communicator.0, stream) };
        self.finish(RECEIVE, begun, until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_or_it_is_named_what_is_missing() {
        match fresh_id() {
            Ok(id) => assert!(id.len() == ID && id != fresh_id().unwrap()),
            Err(error) => assert!(error.to_string().starts_with("CUDA: libnccl.so is missing: "), "{error}"),
        }
    }

    #[test]
    fn an_id_of_another_driver_is_refused() {
        let error = Communicator::join(b"shim-link:a", 0).err().unwrap().to_string();
        assert_eq!(error, "join a link by NCCL: found an id of 11 bytes, expected 128");
    }
}
