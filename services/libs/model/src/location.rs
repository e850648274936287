//! Where a checkpoint lies: a directory, or `org/name` in the local Hugging Face cache.

use std::env;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::ModelError;

/// A checkpoint's directory and the name it is served under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) dir: PathBuf,
    pub(crate) name: String,
}

/// Finds the checkpoint that `location` means.
///
/// # Errors
/// [`ModelError::NotFound`] names every place that was looked at.
pub(crate) fn locate(location: &str) -> Result<Located, ModelError> {
    locate_in(location, hub_cache().as_deref())
}

/// The cache directory by the rules of the hub's own clients.
fn hub_cache() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

fn locate_in(location: &str, hub: Option<&Path>) -> Result<Located, ModelError> {
    let dir = Path::new(location);
    if !location.is_empty() && dir.is_dir() {
        return Ok(Located { dir: dir.to_path_buf(), name: directory_name(dir) });
    }
    let mut looked = Path::new(".").join(location).display().to_string();
    if dir.is_file() {
        looked.push_str(", which is a file");
    }
    if let (Some(hub), Some((org, name))) = (hub, repository(location)) {
        let repository = hub.join(format!("models--{org}--{name}"));
        if let Some(dir) = snapshot(&repository) {
            return Ok(Located { dir, name: location.to_string() });
        }
        looked = format!("{looked}, {}", repository.join("refs/main").display());
    }
    Err(ModelError::NotFound { location: location.into(), looked })
}

/// The last component of the full path: also for `.` and for paths that end in `..`.
fn directory_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    full.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// `org/name` of characters that the hub allows.
fn repository(location: &str) -> Option<(&str, &str)> {
    let (org, name) = location.split_once('/')?;
    let valid = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part != "." && part != ".." && part.chars().all(allowed)
    };
    (valid(org) && valid(name)).then_some((org, name))
}

/// The snapshot that `refs/main` names.
fn snapshot(repository: &Path) -> Option<PathBuf> {
    let revision = fs::read_to_string(repository.join("refs/main")).ok()?;
    let revision = Path::new(revision.trim());
    let mut components = revision.components();
    let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
    let dir = repository.join("snapshots").join(revision);
    (plain && dir.is_dir()).then_some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cached(revision: &str) -> tempfile::TempDir {
        let hub = tempfile::tempdir().unwrap();
        let repository = hub.path().join("models--org--name");
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::create_dir_all(repository.join("snapshots/abc123")).unwrap();
        fs::write(repository.join("refs/main"), revision).unwrap();
        hub
    }

    #[test]
    fn a_directory_is_named_by_its_last_component() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("my-model");
        fs::create_dir(&dir).unwrap();
        let dotted = dir.join(".").to_string_lossy().into_owned();
        assert_eq!(locate_in(&dotted, None).unwrap().name, "my-model");
    }

    #[test]
    fn a_repository_is_found_by_its_main_revision() {
        let hub = cached("abc123\n");
        let found = locate_in("org/name", Some(hub.path())).unwrap();
        assert_eq!(found.name, "org/name");
        assert!(found.dir.ends_with("models--org--name/snapshots/abc123"));
    }

    #[test]
    fn a_revision_cannot_lead_out_of_the_cache() {
        for revision in ["../snapshots/abc123", "/etc", "..", ""] {
            let hub = cached(revision);
            let error = locate_in("org/name", Some(hub.path())).unwrap_err();
            assert!(matches!(error, ModelError::NotFound { .. }), "{revision:?}: {error}");
        }
    }

    #[test]
    fn a_file_is_said_to_be_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = locate_in(&file.path().to_string_lossy(), None).unwrap_err().to_string();
        assert!(error.contains("expected a directory") && error.ends_with(", which is a file)"), "{error}");
    }

    #[test]
    fn what_is_nowhere_names_every_place() {
        let hub = tempfile::tempdir().unwrap();
        let error = locate_in("no/such", Some(hub.path())).unwrap_err().to_string();
        assert!(error.contains("\"no/such\"") && error.contains("models--no--such"), "{error}");
        for location in ["", "a/b/c", "../x", "org/..", "a\0b"] {
            assert!(matches!(locate_in(location, Some(hub.path())), Err(ModelError::NotFound { .. })), "{location:?}");
        }
    }
}
