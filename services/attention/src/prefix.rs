//! Names of cached prefixes: the latents of a full block follow from its own tokens and all tokens before it.

use sha2::{Digest, Sha256};

/// Names the latents of one full block: a hash over the salt and every token up to the block's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefixKey([u8; 32]);

/// The keys of the full blocks of one growing sequence.
#[derive(Debug, Clone)]
pub struct PrefixChain {
    start: PrefixKey,
    keys: Vec<PrefixKey>,
}

impl PrefixChain {
    /// A chain without blocks. Sequences share blocks only under the same salt.
    pub fn new(salt: &[u8]) -> Self {
        Self { start: PrefixKey(Sha256::digest(salt).into()), keys: Vec::new() }
    }

    /// Names every block of `block` positions that `tokens` fill; what was named before is not looked at again.
    pub fn extend(&mut self, tokens: &[u32], block: usize) {
        let named = self.keys.len() * block;
        for tokens in tokens.get(named..).unwrap_or_default().chunks_exact(block) {
            self.keys.push(next(self.keys.last().unwrap_or(&self.start), tokens));
        }
    }

    /// The keys so far, in order of position.
    pub fn keys(&self) -> &[PrefixKey] {
        &self.keys
    }
}

fn next(before: &PrefixKey, tokens: &[u32]) -> PrefixKey {
    let mut hash = Sha256::new_with_prefix(before.0);
    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    PrefixKey(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(salt: &[u8], tokens: &[u32]) -> Vec<PrefixKey> {
        let mut chain = PrefixChain::new(salt);
        chain.extend(tokens, 4);
        chain.keys().to_vec()
    }

    #[test]
    fn a_key_stands_for_all_tokens_up_to_its_end() {
        let whole = keys(b"", &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(whole.len(), 2, "only full blocks");
        assert_eq!(keys(b"", &[1, 2, 3, 4, 5, 6, 7, 9])[0], whole[0]);
        assert_ne!(keys(b"", &[1, 2, 3, 4, 5, 6, 7, 9])[1], whole[1]);
        assert_ne!(keys(b"", &[0, 2, 3, 4, 5, 6, 7, 8])[1], whole[1], "an earlier token differs");
        assert_ne!(keys(b"tenant", &[1, 2, 3, 4])[0], whole[0]);
    }

    #[test]
    fn growing_names_what_was_named_at_once() {
        let tokens: Vec<u32> = (0..23).collect();
        let mut chain = PrefixChain::new(b"s");
        for end in 0..=tokens.len() {
            chain.extend(&tokens[..end], 4);
        }
        assert_eq!(chain.keys(), keys(b"s", &tokens));
    }
}
