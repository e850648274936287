//! Prompts of random token ids.

/// Decides which ids prompts are made of.
const CANDIDATES: u64 = 0x5eed;

/// Draws prompts.
#[derive(Debug, Clone)]
pub struct Prompts {
    ids: Vec<u32>,
    random: SplitMix,
}

impl Prompts {
    /// At most `count` ids below `vocab`, in random order, to choose prompts from.
    pub fn candidates(vocab: u32, count: usize) -> Vec<u32> {
        let mut random = SplitMix(CANDIDATES);
        let mut ids: Vec<u32> = (0..vocab).collect();
        let taken = count.min(ids.len());
        for at in 0..taken {
            let other = at + random.below(ids.len() - at);
            ids.swap(at, other);
        }
        ids.truncate(taken);
        ids
    }

    /// Prompts of these ids, decided by `seed`.
    pub fn new(ids: Vec<u32>, seed: u64) -> Self {
        Self { ids, random: SplitMix(seed) }
    }

    /// A prompt unlike those before it, so that nothing cached serves it.
    ///
    /// # Panics
    /// When there are no ids.
    pub fn draw(&mut self, length: usize) -> Vec<u32> {
        (0..length).map(|_| self.ids[self.random.below(self.ids.len())]).collect()
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        // The upper half of a product: even enough for prompts.
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// A number in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_distinct_and_always_the_same() {
        let ids = Prompts::candidates(1000, 100);
        assert_eq!(ids, Prompts::candidates(1000, 100));
        let distinct: std::collections::BTreeSet<u32> = ids.iter().copied().collect();
        assert_eq!((distinct.len(), ids.iter().all(|id| *id < 1000)), (100, true));
        assert_eq!(Prompts::candidates(10, 100).len(), 10);
    }

    #[test]
    fn prompts_differ_within_a_run_and_between_seeds() {
        let prompts = |seed| Prompts::new(vec![3, 5, 8, 13], seed);
        let (mut one, mut same, mut other) = (prompts(1), prompts(1), prompts(2));
        let (a, b) = (one.draw(64), one.draw(64));
        assert_ne!(a, b);
        assert_ne!(other.draw(64), a);
        assert_eq!((same.draw(64), same.draw(64)), (a.clone(), b));
        assert!(a.iter().all(|id| [3, 5, 8, 13].contains(id)));
    }

    #[test]
    fn numbers_stay_in_their_range() {
        let mut random = SplitMix(7);
        assert!((0..1000).all(|_| random.below(10) < 10));
        let units: Vec<f32> = (0..1000).map(|_| random.unit()).collect();
        assert!(units.iter().all(|unit| (-1.0..1.0).contains(unit)));
        assert!(units.iter().any(|unit| *unit < -0.9) && units.iter().any(|unit| *unit > 0.9));
    }
}
