//! Reading the small documents of a checkpoint.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::ModelError;

/// Bytes that no document of a checkpoint comes near; the largest (tokenizer, index) have tens of megabytes.
const LIMIT: u64 = 256 << 20;

/// The whole of a document.
///
/// # Errors
/// When it cannot be read or is larger than any real one.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    let file = File::open(path).map_err(ModelError::io(path, "open"))?;
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes).map_err(ModelError::io(path, "read"))?;
    if bytes.len() as u64 > LIMIT {
        return Err(ModelError::FileTooLarge { path: path.to_path_buf(), found: bytes.len() as u64, limit: LIMIT });
    }
    Ok(bytes)
}

/// As [`read`]; `None` where there is no such file.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    match read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(ModelError::Io { cause, .. }) if cause.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
