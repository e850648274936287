//! API keys.

use std::{fs, path::Path};

use bytes::Bytes;
use conclave_serve::{Error, ErrorKind};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// The keys that clients may present; none at all means that no key is asked for.
#[derive(Clone, Default)]
pub struct ApiKeys {
    keys: std::sync::Arc<[String]>,
}

impl ApiKeys {
    /// Reads keys from a file: one a line; empty lines and lines that begin with `#` do not count.
    ///
    /// # Errors
    /// When the file cannot be read, holds no key, or a key cannot stand in a header.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(|e| Error::invalid(format!("API keys {}: {e}", path.display())))?;
        Self::parse(&text).map_err(|message| Error::invalid(format!("API keys {}: {message}", path.display())))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).enumerate();
        let keys: Vec<_> = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).collect();
        if let Some((line, _)) = keys.iter().find(|(_, key)| !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(format!("line {}: found a key with blanks or non-ASCII characters, expected none", line + 1));
        }
        if keys.is_empty() {
            return Err("found no key, expected at least one line with a key".to_owned());
        }
        Ok(Self { keys: keys.into_iter().map(|(_, key)| key.to_owned()).collect() })
    }

    /// Checks the value of an `Authorization` header. Takes the same time wherever a wrong key differs.
    ///
    /// # Errors
    /// When there is no key or a wrong one.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<Tenant, Error> {
        if self.keys.is_empty() {
            return Ok(Tenant::default());
        }
        let refuse = |message: &str| Err(Error::new(ErrorKind::Unauthenticated, message));
        let Some(key) = authorization.and_then(bearer) else {
            return refuse("no API key found, expected the header \"Authorization: Bearer KEY\"");
        };
        let known = self.keys.iter().fold(Choice::from(0), |known, ours| known | ours.as_bytes().ct_eq(key));
        if bool::from(known) { Ok(Tenant::of(key)) } else { refuse("the API key is not known here") }
    }
}

/// Who calls: told apart by their keys. One for all where no key is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tenant(Bytes);

impl Tenant {
    fn of(key: &[u8]) -> Self {
        Self(Bytes::copy_from_slice(&Sha256::digest(key)))
    }

    /// Keeps this tenant's cached prefixes from the others. Says nothing about the key.
    pub fn cache_salt(&self) -> Bytes {
        self.0.clone()
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> ApiKeys {
        ApiKeys::parse("# ours\nsk-one\n\n  sk-two  \n").expect("two keys")
    }

    #[test]
    fn each_key_is_a_tenant_of_its_own() {
        let salt = |key: &str| keys().check(Some(format!("Bearer {key}").as_bytes())).expect("a key").cache_salt();
        assert_eq!(salt("sk-one"), salt("sk-one"));
        assert_ne!(salt("sk-one"), salt("sk-two"));
        assert!(!salt("sk-one").windows(6).any(|part| part == b"sk-one"));
    }

    #[test]
    fn every_listed_key_opens() {
        for key in ["Bearer sk-one", "bearer sk-two", "Bearer   sk-two "] {
            assert!(keys().check(Some(key.as_bytes())).is_ok(), "{key}");
        }
    }

    #[test]
    fn nothing_else_does() {
        for key in ["Bearer sk-on", "Bearer sk-one1", "Bearer ", "Bearer # ours", "Basic sk-one", "sk-one", ""] {
            let error = keys().check(Some(key.as_bytes())).expect_err(key);
            assert_eq!(error.kind, ErrorKind::Unauthenticated);
        }
        assert!(keys().check(None).is_err());
    }

    #[test]
    fn without_keys_nobody_is_asked() {
        assert_eq!(ApiKeys::default().check(None), Ok(Tenant::default()));
    }

    #[test]
    fn a_file_without_keys_is_refused() {
        assert_eq!(
            ApiKeys::parse("# nothing\n").err().as_deref(),
            Some("found no key, expected at least one line with a key")
        );
        let blank = ApiKeys::parse("good\nnot good\n").err();
        assert_eq!(blank.as_deref(), Some("line 2: found a key with blanks or non-ASCII characters, expected none"));
    }
}
