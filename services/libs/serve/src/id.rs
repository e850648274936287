//! Names drawn from the operating system's randomness.

/// Letters and digits that cannot be mistaken for one another (no 0, 1, l, o).
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const SUFFIX_LEN: usize = 8;

/// An id for a process that was given none: `role-xxxxxxxx`, 40 random bits.
///
/// # Errors
/// When the operating system has no randomness to give.
pub fn instance_id(role: &str) -> std::io::Result<String> {
    let mut bytes = [0_u8; SUFFIX_LEN];
    getrandom::fill(&mut bytes)?;
    let suffix: String = bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    Ok(format!("{role}-{suffix}"))
}

/// 64 random bits, for seeds and jitter.
///
/// # Errors
/// When the operating system has no randomness to give.
pub fn random_u64() -> std::io::Result<u64> {
    Ok(getrandom::u64()?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_carry_the_role_and_differ() {
        let ids: HashSet<String> = (0..1000).map(|_| instance_id("expert").expect("randomness")).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            let suffix = id.strip_prefix("expert-").expect("the role comes first");
            assert!(suffix.len() == SUFFIX_LEN && suffix.bytes().all(|c| ALPHABET.contains(&c)), "{id}");
            assert!(crate::args::name(&id).is_ok(), "{id} is a valid name");
        }
    }
}
