//! Where prefixes were computed last: a guess at what the replicas have in their caches. Pure.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use conclave_proto::InstanceId;

/// Tokens of one link of a chain: what the replicas cache as one block.
const LINK: usize = 64;
/// Links remembered; the oldest go first.
const MOST: usize = 1 << 16;

/// Names the beginnings of a prompt, a whole number of links each, under one salt.
pub(super) fn chain(salt: &[u8], tokens: &[u32]) -> Vec<u64> {
    let mut hasher = DefaultHasher::new();
    salt.hash(&mut hasher);
    let mut before = hasher.finish();
    let link = |tokens: &[u32]| {
        let mut hasher = DefaultHasher::new();
        (before, tokens).hash(&mut hasher);
        before = hasher.finish();
        before
    };
    tokens.chunks_exact(LINK).map(link).collect()
}

/// The replica that was the last to compute each beginning.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    places: HashMap<u64, Place>,
    /// Links by when they were last used.
    order: BTreeMap<u64, u64>,
    clock: u64,
}

#[derive(Debug)]
struct Place {
    replica: InstanceId,
    used: u64,
}

impl Prefixes {
    /// Links of `chain`, from the first on, that a replica is believed to have.
    pub(super) fn cached(&self, chain: &[u64], replica: &InstanceId) -> usize {
        let has = |link: &&u64| self.places.get(link).is_some_and(|place| place.replica == *replica);
        chain.iter().take_while(has).count()
    }

    /// Notes that `replica` computes `chain` now.
    pub(super) fn remember(&mut self, chain: &[u64], replica: &InstanceId) {
        // The first link last: of a chain that is forgotten the end goes first.
        for link in chain.iter().rev() {
            self.clock += 1;
            let place = Place { replica: replica.clone(), used: self.clock };
            if let Some(old) = self.places.insert(*link, place) {
                self.order.remove(&old.used);
            }
            self.order.insert(self.clock, *link);
        }
        while self.places.len() > MOST {
            let Some((_, link)) = self.order.pop_first() else { break };
            self.places.remove(&link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> InstanceId {
        InstanceId(name.to_owned())
    }

    #[test]
    fn the_last_replica_to_compute_a_beginning_has_it() {
        let tokens: Vec<u32> = (0..300).collect();
        let (whole, part) = (chain(b"", &tokens), chain(b"", &tokens[..200]));
        assert_eq!((whole.len(), part.len()), (4, 3));
        let mut prefixes = Prefixes::default();
        prefixes.remember(&part, &id("a"));
        assert_eq!((prefixes.cached(&whole, &id("a")), prefixes.cached(&whole, &id("b"))), (3, 0));
        prefixes.remember(&whole, &id("b"));
        assert_eq!((prefixes.cached(&part, &id("a")), prefixes.cached(&whole, &id("b"))), (0, 4));
        assert_eq!(prefixes.cached(&chain(b"salt", &tokens), &id("b")), 0);
    }

    #[test]
    fn what_was_not_used_for_long_is_forgotten_from_its_end() {
        let long: Vec<u64> = (0..MOST as u64).collect();
        let mut prefixes = Prefixes::default();
        prefixes.remember(&long, &id("a"));
        prefixes.remember(&[u64::MAX], &id("a"));
        assert_eq!(prefixes.cached(&long, &id("a")), MOST - 1);
        assert_eq!((prefixes.places.len(), prefixes.order.len()), (MOST, MOST));
    }
}
