//! Copies between the host and a GPU go through memory of the host that the GPU reads and writes by itself, while the
//! processor and the stream go on. (The driver goes through such memory of its own, and waits for the stream where copies are
//! large.)

use std::{ops::Range, ptr::NonNull, slice, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaStream, DriverError, result,
    sys::{CUevent, CUevent_flags},
};

use super::ring::{Parts, Ring};

/// Bytes that copies to the GPU take turns in, and those that each from the GPU goes through.
const UP: usize = 32 << 20;
const DOWN: usize = 16 << 20;

/// Pinned memory.
struct Pinned {
    context: Arc<CudaContext>,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is owned.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: owned by what is returned, and zeroed before it is read.
        let start = unsafe { result::malloc_host(bytes, 0) }?;
        let start = NonNull::new(start.cast::<u8>()).expect("memory that was given lies somewhere");
        // SAFETY: as large as it was asked for.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), start, bytes })
    }

    /// Some of it, which no copy may be under way of.
    fn piece(&mut self, piece: Range<usize>) -> &mut [u8] {
        assert!(piece.start <= piece.end && piece.end <= self.bytes, "{piece:?} of {} bytes", self.bytes);
        // SAFETY: inside, as checked, owned, and written in whole when it was made.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr().add(piece.start), piece.len()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let start = self.start.as_ptr();
        // SAFETY: from malloc_host. Whoever has it waits for copies under way before it goes.
        let freed = self.context.bind_to_thread().and_then(|()| unsafe { result::free_host(start.cast()) });
        if let Err(error) = freed {
            tracing::warn!(%error, bytes = self.bytes, "cannot free pinned memory");
        }
    }
}

/// Tells when a copy has ended.
struct End(CUevent);

// SAFETY: a handle that the CUDA driver lets any thread use.
unsafe impl Send for End {}

impl End {
    fn new() -> Result<Self, DriverError> {
        result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).map(Self)
    }

    /// Ends when what is queued now has.
    fn record(&self, stream: &CudaStream) -> Result<(), DriverError> {
        // SAFETY: an event and a stream that live.
        unsafe { result::event::record(self.0, stream.cu_stream()) }
    }

    fn has_ended(&self) -> bool {
        // SAFETY: an event that lives. An error is met again by who waits.
        unsafe { result::event::query(self.0) }.is_ok()
    }

    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: an event that lives.
        unsafe { result::event::synchronize(self.0) }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: not used any more. What cannot be destroyed goes with the context.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Copies to the GPU: they are queued, their bytes having been taken over.
pub(super) struct Uploads {
    stream: Arc<CudaStream>,
    memory: Pinned,
    ring: Ring<End>,
    spare: Vec<End>,
}

impl Uploads {
    /// For one stream.
    pub(super) fn new(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        let memory = Pinned::new(context, UP)?;
        Ok(Self { stream: stream.clone(), memory, ring: Ring::new(UP), spare: Vec::new() })
    }

    /// Queues the copy of `parts`, one behind the other. Waits only where copies before it have not left room.
    ///
    /// # Safety
    /// `to` is memory of the GPU with room for all of them, alive until the copy has ended. The context is bound.
    pub(super) unsafe fn copy(&mut self, to: u64, parts: &[&[u8]]) -> Result<(), DriverError> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let mut parts = Parts::new(parts);
        let mut done = 0;
        while done < total {
            let bytes = self.ring.largest().min(total - done);
            let piece = self.room(bytes)?;
            let from = self.memory.piece(piece.clone());
            parts.read(from);
            let end = self.spare.pop().map_or_else(End::new, Ok)?;
            // SAFETY: the caller's promise; the piece stays as it is until `end`, which the ring waits for.
            unsafe { result::memcpy_htod_async(to + done as u64, from, self.stream.cu_stream()) }?;
            end.record(&self.stream)?;
            self.ring.queued(piece, end);
            done += bytes;
        }
        Ok(())
    }

    fn room(&mut self, bytes: usize) -> Result<Range<usize>, DriverError> {
        self.spare.extend(std::iter::from_fn(|| self.ring.ended(End::has_ended)));
        self.ring.room(bytes, |end| {
            end.wait()?;
            self.spare.push(end);
            Ok(())
        })
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        // The memory goes next; a stream that has failed copies nothing more.
        let _ = self.stream.synchronize();
    }
}

/// Copies from the GPU.
pub(super) struct Downloads {
    stream: Arc<CudaStream>,
    memory: Pinned,
}

impl Downloads {
    /// For one stream.
    pub(super) fn new(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        Ok(Self { stream: stream.clone(), memory: Pinned::new(context, DOWN)? })
    }

    /// Waits for what is queued, then copies.
    ///
    /// # Safety
    /// `from` is memory of the GPU of as many bytes. The context is bound.
    pub(super) unsafe fn copy(&mut self, from: u64, bytes: &mut [u8]) -> Result<(), DriverError> {
        let mut from = from;
        for part in bytes.chunks_mut(DOWN) {
            let through = self.memory.piece(0..part.len());
            // SAFETY: the caller's promise; `through` is left alone until the copy has ended, below.
            unsafe { result::memcpy_dtoh_async(through, from, self.stream.cu_stream()) }?;
            self.stream.synchronize()?;
            part.copy_from_slice(through);
            from += part.len() as u64;
        }
        Ok(())
    }
}
