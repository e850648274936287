//! `model.safetensors.index.json`: which file of the directory has which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde_json::Value;

use super::{Entry, TensorError};
use crate::json::{self, Fields, JsonError};

/// Which file has which tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Index {
    files: BTreeMap<String, String>,
}

impl Index {
    /// Parses the text of an index.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, TensorError> {
        let document = json::object(text).map_err(in_index)?;
        let root = Fields::root(&document);
        let map = root.object("weight_map").map_err(in_index)?;
        let map = map.ok_or_else(|| in_index(root.missing("weight_map", "an object of tensor: file")))?;
        let files = map.entries().map(|(tensor, file)| file_of(&map, tensor, file)).collect::<Result<_, _>>()?;
        let index = Self { files };
        if index.files.is_empty() { Err(TensorError::EmptyIndex) } else { Ok(index) }
    }

    /// The files, ascending, each with one of its tensors.
    pub(crate) fn shards(&self) -> impl Iterator<Item = (&str, &str)> {
        let first: BTreeMap<&str, &str> =
            self.files.iter().rev().map(|(tensor, file)| (file.as_str(), tensor.as_str())).collect();
        first.into_iter()
    }

    /// Checks that `file` has exactly the tensors that the index puts there.
    pub(crate) fn check_shard(&self, file: &str, entries: &[Entry]) -> Result<(), TensorError> {
        for entry in entries {
            let expected = self.files.get(&entry.name);
            if expected.is_none_or(|expected| expected != file) {
                let expected = expected.map_or("no such tensor".into(), |other| format!("it in {other}"));
                return Err(TensorError::NotInIndex { tensor: entry.name.clone(), file: file.into(), expected });
            }
        }
        let found: BTreeSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        let lost = self.files.iter().find(|(tensor, place)| *place == file && !found.contains(tensor.as_str()));
        match lost {
            Some((tensor, _)) => Err(TensorError::NotInShard { tensor: tensor.clone(), file: file.into() }),
            None => Ok(()),
        }
    }
}

fn in_index(error: JsonError) -> TensorError {
    TensorError::Json { document: "index", error }
}

fn file_of(map: &Fields<'_>, tensor: &str, file: &Value) -> Result<(String, String), TensorError> {
    let Some(file) = file.as_str() else { return Err(in_index(map.wrong(tensor, file, "a file name"))) };
    let mut components = Path::new(file).components();
    let plain =
        matches!(components.next(), Some(Component::Normal(name)) if name == file) && components.next().is_none();
    if !plain || file.contains(['/', '\\', '\0']) {
        return Err(TensorError::UnsafeFileName { tensor: tensor.into(), file: json::quote(file) });
    }
    Ok((tensor.into(), file.into()))
}
