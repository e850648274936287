//! Memory for weights: 64-byte aligned blocks, packed into anonymous mappings on huge pages.
#![allow(unsafe_code)]

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;
use memmap2::{MmapOptions, MmapRaw};

use crate::KernelError;

const ALIGN: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
/// Blocks below this size share mappings.
const CHUNK: usize = 64 << 20;

/// Gives out blocks. Small ones lie one behind the other in shared chunks, so that they fill huge pages; a chunk goes
/// back to the system when the last of its blocks does.
#[derive(Default)]
pub(crate) struct Arena {
    filling: Mutex<Option<(Arc<Chunk>, usize)>>,
}

struct Chunk {
    map: MmapRaw,
    /// Offset of the first huge page border.
    start: usize,
    bytes: usize,
}

/// Zeroed memory of one weight.
pub(crate) struct Block<T> {
    _chunk: Arc<Chunk>,
    start: NonNull<T>,
    length: usize,
    values: PhantomData<T>,
}

// SAFETY: a block is the only owner of its part of the chunk, like a boxed slice.
unsafe impl<T: Send> Send for Block<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Block<T> {}

impl Arena {
    /// A zeroed block of `length` elements.
    ///
    /// # Errors
    /// When the operating system gives no memory.
    pub(crate) fn block<T: Pod>(&self, length: usize) -> Result<Block<T>, KernelError> {
        let bytes = length.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_next_multiple_of(ALIGN));
        let bytes = bytes.ok_or_else(out_of_memory)?;
        let (chunk, offset) = if bytes >= CHUNK / 4 { (Arc::new(Chunk::map(bytes)?), 0) } else { self.reserve(bytes)? };
        // SAFETY: `offset + bytes` lies within the chunk.
        let start = unsafe { chunk.map.as_mut_ptr().add(chunk.start + offset) };
        let start = NonNull::new(start.cast()).ok_or_else(out_of_memory)?;
        Ok(Block { _chunk: chunk, start, length, values: PhantomData })
    }

    fn reserve(&self, bytes: usize) -> Result<(Arc<Chunk>, usize), KernelError> {
        let mut filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((chunk, used)) = filling.as_mut().filter(|(chunk, used)| used.saturating_add(bytes) <= chunk.bytes)
        {
            let offset = *used;
            *used += bytes;
            return Ok((chunk.clone(), offset));
        }
        let chunk = Arc::new(Chunk::map(CHUNK)?);
        *filling = Some((chunk.clone(), bytes));
        Ok((chunk, 0))
    }
}

impl Chunk {
    fn map(bytes: usize) -> Result<Self, KernelError> {
        let length = bytes.checked_add(HUGE_PAGE).ok_or_else(out_of_memory)?;
        let map = MmapOptions::new()
            .len(length)
            .map_anon()
            .map_err(|source| KernelError::Os { what: "map memory for weights", source })?;
        let map = MmapRaw::from(map);
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for weights");
        }
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        Ok(Self { map, start: start.min(HUGE_PAGE), bytes })
    }
}

fn out_of_memory() -> KernelError {
    KernelError::Os { what: "map memory for weights", source: std::io::ErrorKind::OutOfMemory.into() }
}

impl<T: Pod> Deref for Block<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `length` initialised (zeroed) elements owned by this block, aligned to 64 bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T: Pod> DerefMut for Block<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`; borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_disjoint_and_outlive_the_arena() {
        let arena = Arena::default();
        let mut blocks: Vec<Block<u16>> =
            [1, 33, 100, 0, 5 << 20, 9 << 20, 40 << 20, 7].iter().map(|length| arena.block(*length).unwrap()).collect();
        drop(arena);
        for (index, block) in blocks.iter_mut().enumerate() {
            assert_eq!(block.as_ptr() as usize % ALIGN, 0);
            assert!(block.iter().step_by(1000).all(|value| *value == 0));
            block.fill(index as u16 + 1);
        }
        for (index, block) in blocks.iter().enumerate() {
            assert!(block.iter().step_by(511).all(|value| usize::from(*value) == index + 1));
        }
    }

    #[test]
    fn refuses_what_cannot_be_had() {
        assert!(Arena::default().block::<u16>(usize::MAX / 2).is_err());
        assert!(Arena::default().block::<u16>(1 << 60).is_err());
    }
}
