//! What waits, by layer. Pure.

use std::collections::{BTreeMap, VecDeque};

/// One queue per layer, bounded by the rows in all of them.
#[derive(Debug)]
pub(crate) struct LayerQueues<T> {
    layers: BTreeMap<u32, VecDeque<Waiting<T>>>,
    rows: usize,
    limit: usize,
    arrivals: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    arrival: u64,
    rows: usize,
    item: T,
}

impl<T> LayerQueues<T> {
    /// Empty, for at most `limit` rows.
    pub(crate) fn new(limit: usize) -> Self {
        Self { layers: BTreeMap::new(), rows: 0, limit, arrivals: 0 }
    }

    /// Rows that wait.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Appends to a layer's queue.
    ///
    /// # Errors
    /// With the item, where that would pass the limit.
    pub(crate) fn push(&mut self, layer: u32, rows: usize, item: T) -> Result<(), T> {
        if self.rows + rows > self.limit {
            return Err(item);
        }
        self.rows += rows;
        self.arrivals += 1;
        self.layers.entry(layer).or_default().push_back(Waiting { arrival: self.arrivals, rows, item });
        Ok(())
    }

    /// Takes from the queue whose head has waited longest: its head, and what follows as long as all have at most
    /// `most` rows together.
    pub(crate) fn take(&mut self, most: usize) -> Option<(u32, Vec<T>)> {
        let arrival = |queue: &VecDeque<Waiting<T>>| queue.front().map(|head| head.arrival);
        let layer = *self.layers.iter().min_by_key(|(_, queue)| arrival(queue))?.0;
        let queue = self.layers.get_mut(&layer)?;
        let mut taken = Vec::new();
        let mut rows = 0;
        while let Some(head) = queue.front()
            && (taken.is_empty() || rows + head.rows <= most)
        {
            rows += head.rows;
            taken.extend(queue.pop_front().map(|head| head.item));
        }
        if queue.is_empty() {
            self.layers.remove(&layer);
        }
        self.rows -= rows;
        Some((layer, taken))
    }

    /// Drops everything that waits.
    pub(crate) fn clear(&mut self) {
        self.layers.clear();
        self.rows = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_layer_goes_first_and_takes_along_what_waits_there() {
        let mut queue = LayerQueues::new(100);
        for (layer, item) in [(7, "a"), (3, "b"), (7, "c"), (3, "d")] {
            queue.push(layer, 10, item).unwrap();
        }
        assert_eq!(queue.take(100), Some((7, vec!["a", "c"])));
        queue.push(7, 10, "e").unwrap();
        assert_eq!(queue.take(100), Some((3, vec!["b", "d"])));
        assert_eq!(queue.take(100), Some((7, vec!["e"])));
        assert_eq!((queue.take(100), queue.rows()), (None, 0));
    }

    #[test]
    fn merging_stops_at_the_limit_but_the_head_always_goes() {
        let mut queue = LayerQueues::new(100);
        for (rows, item) in [(30, 1), (20, 2), (20, 3)] {
            queue.push(0, rows, item).unwrap();
        }
        assert_eq!(queue.take(50), Some((0, vec![1, 2])));
        assert_eq!(queue.take(5), Some((0, vec![3])));
    }

    #[test]
    fn rows_are_bounded() {
        let mut queue = LayerQueues::new(25);
        assert!(queue.push(0, 20, ()).is_ok());
        assert!(queue.push(1, 6, ()).is_err());
        assert!(queue.push(1, 5, ()).is_ok());
        queue.take(100);
        assert_eq!(queue.rows(), 5);
        queue.clear();
        assert!(queue.push(0, 25, ()).is_ok());
    }
}
