//! Which ids may be sampled at all.

/// A set of token ids: those that the tokenizer has a string for. The rows beyond are padding and were never trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u64>,
    vocab: usize,
}

impl TokenMask {
    /// The ids below `vocab` that `allowed` says yes to.
    pub fn new(vocab: usize, allowed: impl Fn(u32) -> bool) -> Self {
        let mut words = vec![0u64; vocab.div_ceil(64)];
        for id in 0..vocab {
            words[id / 64] |= u64::from(allowed(id as u32)) << (id % 64);
        }
        Self { words, vocab }
    }

    /// Size of the vocabulary it was made for.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Whether an id is in the set.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    /// Makes the logits `[vocab]` of all other ids negative infinity.
    pub fn take_out(&self, logits: &mut [f32]) {
        for (index, logits) in logits.chunks_mut(64).enumerate() {
            let word = self.words.get(index).copied().unwrap_or(0);
            if word != u64::MAX {
                let others = logits.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
                others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }

    /// Bits of the ids in the set: that of id `i` in word `i / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Ids in the set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_exactly_the_allowed_ids() {
        let mask = TokenMask::new(130, |id| id % 3 == 0);
        assert!((0..130).all(|id| mask.allows(id) == (id % 3 == 0)));
        assert!(!mask.allows(130) && !mask.allows(u32::MAX));
        assert_eq!((mask.count(), mask.vocab()), (44, 130));
        let mut logits = [1.0; 131];
        mask.take_out(&mut logits);
        assert!((0..).zip(logits).all(|(id, logit)| logit == if mask.allows(id) { 1.0 } else { f32::NEG_INFINITY }));
    }
}
