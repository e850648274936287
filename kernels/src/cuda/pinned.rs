//! Copies between the host and a GPU go through memory of the host that the GPU reads and writes by itself, while the
//! processor and the stream go on. (The driver goes through such memory of its own, and waits for the stream where copies are
//! large.)

use std::{ops::Range, ptr::NonNull, slice, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaStream, DriverError, result,
    sys::{CUevent, CUevent_flags},
};

use super::ring::{Parts, Ring};

/// Bytes that copies to the GPU take turns in, and the least that one from the GPU goes through.
const UP: usize = 32 << 20;
const DOWN: usize = 1 << 20;

/// Pinned memory.
pub(super) struct Pinned {
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

/// Copies from the GPU. Each has memory of its own, which is used again.
pub(super) struct Downloads {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    spare: Vec<Pinned>,
}

/// A copy from the GPU under way: parts one behind the other.
pub struct Download {
    memory: Option<Pinned>,
    end: End,
    parts: Vec<usize>,
}

impl Downloads {
    /// For one stream.
    pub(super) fn new(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) -> Self {
        Self { context: context.clone(), stream: stream.clone(), spare: Vec::new() }
    }

    /// Queues the copy of `parts`, addresses and bytes.
    ///
    /// # Safety
    /// The parts are memory of the GPU, alive until the copy has ended. The context is bound.
    pub(super) unsafe fn fetch(&mut self, parts: &[(u64, usize)]) -> Result<Download, DriverError> {
        let mut memory = self.room(parts.iter().map(|(_, bytes)| bytes).sum())?;
        let mut start = 0;
        for (from, bytes) in parts.iter().filter(|(_, bytes)| *bytes > 0) {
            let through = memory.piece(start..start + bytes);
            // SAFETY: the caller's promise; `through` is left alone until the copy has ended, by `Download`.
            unsafe { result::memcpy_dtoh_async(through, *from, self.stream.cu_stream()) }?;
            start += bytes;
        }
        let end = End::new()?;
        end.record(&self.stream)?;
        Ok(Download { memory: Some(memory), end, parts: parts.iter().map(|(_, bytes)| *bytes).collect() })
    }

    /// The memory of a copy is free again.
    pub(super) fn reuse(&mut self, memory: Pinned) {
        self.spare.push(memory);
    }

    /// The smallest memory that suffices; new memory where none does.
    fn room(&mut self, bytes: usize) -> Result<Pinned, DriverError> {
        let fits = self.spare.iter().enumerate().filter(|(_, memory)| memory.bytes >= bytes);
        match fits.min_by_key(|(_, memory)| memory.bytes).map(|(index, _)| index) {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => {
                // What did not suffice will not be needed again.
                self.spare.pop();
                Pinned::new(&self.context, bytes.next_power_of_two().max(DOWN))
            }
        }
    }
}

impl Download {
    /// Waits, then hands the parts out; what the copy went through is left.
    pub(super) fn take(mut self, parts: &mut [&mut [u8]]) -> Result<Option<Pinned>, DriverError> {
        self.end.wait()?;
        let Some(mut memory) = self.memory.take() else { return Ok(None) };
        assert!(self.parts.iter().copied().eq(parts.iter().map(|part| part.len())), "parts of a copy");
        let mut start = 0;
        for part in parts {
            part.copy_from_slice(memory.piece(start..start + part.len()));
            start += part.len();
        }
        Ok(Some(memory))
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // Nobody took it: the copy must have ended before its memory goes.
        if self.memory.is_some() {
            let _ = self.end.wait();
        }
    }
}
