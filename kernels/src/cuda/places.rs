//! Which tensor maps lie where.

/// A few places for maps, each of a view of the same values. Where all are taken, the view that came first makes room.
#[derive(Debug)]
pub(super) struct Places<V> {
    views: Vec<V>,
    oldest: usize,
}

impl<V> Default for Places<V> {
    fn default() -> Self {
        Self { views: Vec::new(), oldest: 0 }
    }
}

impl<V: PartialEq> Places<V> {
    /// How many there are.
    pub(super) const COUNT: usize = 8;

    /// Where the map of a view lies.
    pub(super) fn find(&self, view: &V) -> Option<usize> {
        self.views.iter().position(|known| known == view)
    }

    /// Where the next one goes.
    pub(super) fn next(&self) -> usize {
        if self.views.len() < Self::COUNT { self.views.len() } else { self.oldest }
    }

    /// Notes that the map of a view lies at the next place, which it gives.
    pub(super) fn put(&mut self, view: V) -> usize {
        let place = self.next();
        if place == self.views.len() {
            self.views.push(view);
        } else {
            self.views[place] = view;
            self.oldest = (place + 1) % Self::COUNT;
        }
        place
    }

    /// There are none any more.
    pub(super) fn clear(&mut self) {
        self.views.clear();
        self.oldest = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_too_many_makes_room() {
        let mut places = Places::default();
        for view in 0..Places::<usize>::COUNT {
            assert_eq!((places.find(&view), places.next(), places.put(view)), (None, view, view));
        }
        assert_eq!((places.put(100), places.put(101)), (0, 1));
        assert_eq!([0, 1, 2, 100, 101].map(|view| places.find(&view)), [None, None, Some(2), Some(0), Some(1)]);
        places.clear();
        assert_eq!((places.find(&2), places.next()), (None, 0));
    }
}
