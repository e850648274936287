//! Memory for weights: 64-byte aligned blocks, packed into anonymous mappings on huge pages.
#![allow(unsafe_code)]

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut, Range},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;
use memmap2::{MmapOptions, MmapRaw};

use crate::{KernelError, pool::Pool};

const ALIGN: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
/// Blocks below this size share mappings.
const CHUNK: usize = 64 << 20;

/// Gives out blocks. Small ones lie one behind the other in shared chunks, so that they fill huge pages; a chunk goes
/// back to the system when the last of its blocks does.
#[derive(Default)]
pub(crate) struct Arena {
    filling: Mutex<Option<Filling>>,
}

/// A chunk that is given out block by block.
struct Filling {
    chunk: Arc<Chunk>,
    used: usize,
    /// Bytes whose pages are there.
    touched: usize,
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
    /// A zeroed block of `length` elements. Its pages are there already: the threads of the pool have taken them, each
    /// its own. When threads that fill a block meet a new huge page together, each of them clears one and all but one are
    /// thrown away.
    ///
    /// # Errors
    /// When the operating system gives no memory.
    pub(crate) fn block<T: Pod>(&self, pool: &Pool, length: usize) -> Result<Block<T>, KernelError> {
        let bytes = length.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_next_multiple_of(ALIGN));
        let bytes = bytes.ok_or_else(out_of_memory)?;
        let (chunk, offset) = if bytes >= CHUNK / 4 {
            let chunk = Arc::new(Chunk::map(bytes)?);
            chunk.touch(pool, 0..bytes);
            (chunk, 0)
        } else {
            self.reserve(pool, bytes)?
        };
        // SAFETY: `offset + bytes` lies within the chunk.
        let start = unsafe { chunk.map.as_mut_ptr().add(chunk.start + offset) };
        let start = NonNull::new(start.cast()).ok_or_else(out_of_memory)?;
        Ok(Block { _chunk: chunk, start, length, values: PhantomData })
    }

    fn reserve(&self, pool: &Pool, bytes: usize) -> Result<(Arc<Chunk>, usize), KernelError> {
        let mut filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |filling: &Filling| filling.used.saturating_add(bytes) <= filling.chunk.bytes;
        let filling = match &mut *filling {
            Some(filling) if fits(filling) => filling,
            other => other.insert(Filling { chunk: Arc::new(Chunk::map(CHUNK)?), used: 0, touched: 0 }),
        };
        let offset = filling.used;
        filling.used += bytes;
        if filling.used > filling.touched {
            // Two huge pages for each thread: as much work for one as for the other. But no page that blocks of this size
            // do not reach.
            let ahead = filling.touched + 2 * HUGE_PAGE * pool.threads();
            let reach = filling.used + (filling.chunk.bytes - filling.used) / bytes.max(1) * bytes;
            let end = ahead.min(reach).max(filling.used).next_multiple_of(HUGE_PAGE).min(filling.chunk.bytes);
            filling.chunk.touch(pool, filling.touched..end);
            filling.touched = end;
        }
        Ok((filling.chunk.clone(), offset))
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

    /// Takes the huge pages that begin in `range`, of which nothing has been given out.
    fn touch(&self, pool: &Pool, range: Range<usize>) {
        pool.run(range.len().div_ceil(HUGE_PAGE), |page| {
            let offset = range.start + page * HUGE_PAGE;
            // SAFETY: `offset` lies within the chunk, in a part that nobody has a block of.
            unsafe { self.map.as_mut_ptr().add(self.start + offset).write_volatile(0) };
        });
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
        let (arena, pool) = (Arena::default(), Pool::new(2).unwrap());
        let mut blocks: Vec<Block<u16>> = [1, 33, 100, 0, 5 << 20, 9 << 20, 40 << 20, 7]
            .iter()
            .map(|length| arena.block(&pool, *length).unwrap())
            .collect();
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
        let pool = Pool::new(1).unwrap();
        assert!(Arena::default().block::<u16>(&pool, usize::MAX / 2).is_err());
        assert!(Arena::default().block::<u16>(&pool, 1 << 60).is_err());
    }
}
