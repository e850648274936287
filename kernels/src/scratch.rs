//! Working memory that is kept from one operation to the next.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes of a cache line. Working memory begins with one, so that rows of tiles do not straddle two.
const ALIGN: usize = 64;

/// f32 working memory of this thread; given back when dropped, so that the next taker need not allocate.
pub(crate) struct Scratch {
    memory: Vec<f32>,
    start: usize,
    length: usize,
}

impl Scratch {
    /// `length` values of any content.
    pub(crate) fn take(length: usize) -> Self {
        let mut memory = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
        let padding = ALIGN / size_of::<f32>();
        if memory.len() < length + padding {
            memory.resize(length + padding, 0.0);
        }
        let start = memory.as_ptr().align_offset(ALIGN).min(padding);
        Self { memory, start, length }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        // At the end of a thread the list may be gone already; then the memory is simply freed.
        let _ = FREE.try_with(|free| free.borrow_mut().push(memory));
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.memory[self.start..][..self.length]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..][..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let first = Scratch::take(1000);
        let address = first.as_ptr();
        drop(first);
        let again = Scratch::take(10);
        assert_eq!((again.as_ptr(), again.len()), (address, 10));
        let other = Scratch::take(10);
        assert_ne!(other.as_ptr(), address);
        assert!(other.as_ptr().addr().is_multiple_of(ALIGN) && address.addr().is_multiple_of(ALIGN));
    }
}
