//! Where the kernels lie.

use std::path::{Path, PathBuf};

/// The files of `directory` that end in `.{extension}`, sorted; none where there is no such directory.
pub(crate) fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = directory.read_dir().into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("entry of a directory").path()).collect();
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    files
}
