//! Which parts of a piece of memory are taken by copies under way.

use std::{collections::VecDeque, ops::Range};

/// Every piece begins at a multiple of this.
const ALIGN: usize = 256;

/// Pieces of a ring of bytes, in the order in which copies of them were queued and end. `E` tells when one has ended.
#[derive(Debug)]
pub(super) struct Ring<E> {
    bytes: usize,
    /// Where the next piece begins if there is room up to the end.
    next: usize,
    under_way: VecDeque<(Range<usize>, E)>,
}

impl<E> Ring<E> {
    /// A ring of so many bytes, a multiple of twice [`ALIGN`].
    pub(super) fn new(bytes: usize) -> Self {
        Self { bytes, next: 0, under_way: VecDeque::new() }
    }

    /// Bytes of the largest piece: half of them, so that one is filled while the one before is copied.
    pub(super) fn largest(&self) -> usize {
        self.bytes / 2
    }

    /// Room for a piece that no copy is under way of: `wait` is given the ends of those that were.
    pub(super) fn room<X>(
        &mut self,
        bytes: usize,
        mut wait: impl FnMut(E) -> Result<(), X>,
    ) -> Result<Range<usize>, X> {
        assert!(bytes <= self.largest(), "a piece of {bytes} of {} bytes", self.bytes);
        let start = if self.next + bytes > self.bytes { 0 } else { self.next };
        let piece = start..start + bytes;
        let meets = |taken: &Range<usize>| taken.start < piece.end && piece.start < taken.end;
        while self.under_way.iter().any(|(taken, _)| meets(taken))
            && let Some((_, end)) = self.under_way.pop_front()
        {
            wait(end)?;
        }
        Ok(piece)
    }

    /// A copy of this piece has been queued.
    pub(super) fn queued(&mut self, piece: Range<usize>, end: E) {
        self.next = piece.end.next_multiple_of(ALIGN);
        self.under_way.push_back((piece, end));
    }

    /// The end of the oldest copy, if it has ended: its piece is free.
    pub(super) fn ended(&mut self, has_ended: impl FnOnce(&E) -> bool) -> Option<E> {
        let (_, end) = self.under_way.front()?;
        has_ended(end).then(|| self.under_way.pop_front().expect("the front").1)
    }
}

/// Several slices, read as if they were one.
pub(super) struct Parts<'a> {
    parts: &'a [&'a [u8]],
    /// Bytes of the first that have been read.
    read: usize,
}

impl<'a> Parts<'a> {
    pub(super) fn new(parts: &'a [&'a [u8]]) -> Self {
        Self { parts, read: 0 }
    }

    /// Reads as many bytes as there is room for. There are as many, or the rest stays as it is.
    pub(super) fn read(&mut self, mut to: &mut [u8]) {
        while let [first, rest @ ..] = self.parts
            && !to.is_empty()
        {
            let count = to.len().min(first.len() - self.read);
            to[..count].copy_from_slice(&first[self.read..self.read + count]);
            to = &mut to[count..];
            self.read += count;
            if self.read == first.len() {
                (self.parts, self.read) = (rest, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a piece, the `number`th; which ones were waited for.
    fn take(ring: &mut Ring<u32>, bytes: usize, number: u32) -> (Range<usize>, Vec<u32>) {
        let mut waited = Vec::new();
        let note = |end| {
            waited.push(end);
            Ok::<_, ()>(())
        };
        let piece = ring.room(bytes, note).unwrap();
        ring.queued(piece.clone(), number);
        (piece, waited)
    }

    #[test]
    fn large_pieces_take_turns() {
        let mut ring = Ring::new(1024);
        assert_eq!(take(&mut ring, 512, 0), (0..512, vec![]));
        assert_eq!(take(&mut ring, 512, 1), (512..1024, vec![]));
        assert_eq!(take(&mut ring, 512, 2), (0..512, vec![0]));
        assert_eq!(take(&mut ring, 300, 3), (512..812, vec![1]));
        assert_eq!(take(&mut ring, 512, 4), (0..512, vec![2]));
    }

    #[test]
    fn a_piece_waits_for_those_that_it_meets_and_for_older_ones() {
        let mut ring = Ring::new(2048);
        for number in 0..8 {
            assert_eq!(take(&mut ring, 10, number), (number as usize * 256..number as usize * 256 + 10, vec![]));
        }
        assert_eq!(take(&mut ring, 300, 8), (0..300, vec![0, 1]));
        assert_eq!(take(&mut ring, 10, 9), (512..522, vec![2]));
        // No room before the end: those that lie there are older than what lies at the beginning.
        assert_eq!(take(&mut ring, 1024, 10), (768..1792, vec![3, 4, 5, 6]));
        assert_eq!(take(&mut ring, 300, 11), (0..300, vec![7, 8]));
        let ended: Vec<u32> = std::iter::from_fn(|| ring.ended(|end| *end < 11)).collect();
        assert_eq!(ended, [9, 10]);
        assert_eq!(take(&mut ring, 1024, 12), (512..1536, vec![]));
    }

    #[test]
    fn parts_are_read_one_after_the_other() {
        let mut parts = Parts::new(&[&[1, 2, 3], &[], &[4], &[5, 6]]);
        let mut read = |count| {
            let mut to = vec![0; count];
            parts.read(&mut to);
            to
        };
        assert_eq!(
            [read(2), read(3), read(0), read(1), read(1)],
            [vec![1, 2], vec![3, 4, 5], vec![], vec![6], vec![0]]
        );
    }

    #[test]
    #[should_panic(expected = "a piece of 1025 of 2048 bytes")]
    fn a_piece_that_is_too_large_is_a_bug() {
        take(&mut Ring::new(2048), 1025, 0);
    }
}
