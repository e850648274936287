//! A checkpoint looked at whether or not it can be served: what it is, how large, and everything that is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::DOCUMENTS;
use crate::config::TokenIds;
use crate::generation::GENERATION_CONFIG;
use crate::location::locate;
use crate::sources::{INDEX, Sources};
use crate::tensors::{Placement, TensorError, place};
use crate::{Checkpoint, GenerationDefaults, ModelConfig, ModelError, StoredSizes, Text};

/// What a directory says of the checkpoint in it. What cannot be read is absent, and named in `problems`.
#[derive(Debug)]
pub struct Survey {
    /// The name it would be served under.
    pub name: String,
    /// The directory of the files.
    pub dir: PathBuf,
    /// The architecture.
    pub config: Option<ModelConfig>,
    /// The tensors of all files that can be read.
    pub stored: StoredSizes,
    /// Every file of the directory, by name.
    pub files: Vec<SurveyedFile>,
    /// As [`Checkpoint::fingerprint`]; absent where a tensor is not as it should be.
    pub fingerprint: Option<String>,
    /// The tokenizer, if there is one and it can be used.
    pub text: Option<Text>,
    /// The recommended settings.
    pub generation: Option<GenerationDefaults>,
    /// Why it would be refused, the architecture first; none: it can be served.
    pub problems: Vec<ModelError>,
}

/// A file beside the checkpoint's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SurveyedFile {
    /// Within the directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// What it is read for.
    pub used: FileUse,
}

/// What a file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileUse {
    /// Configuration, index, tokenizer, template, settings.
    Document,
    /// Weights.
    Tensors,
    /// Nothing.
    Unused,
}

impl Survey {
    /// Looks at the checkpoint that `location` means, as for [`Checkpoint::open`].
    ///
    /// # Errors
    /// When there is no such directory. Everything else is among the `problems`.
    pub fn of(location: &str) -> Result<Self, ModelError> {
        let located = locate(location)?;
        let (name, dir) = (located.name.clone(), located.dir.clone());
        let mut problems = Problems::default();
        let config = problems.keep(ModelConfig::survey(&dir)).map(|(config, wrong)| {
            problems.0.extend(wrong);
            config
        });

        let (sources, unreadable) = Sources::open_readable(&dir);
        let is_whole = unreadable.is_empty();
        problems.0.extend(unreadable);
        let fingerprint = config.as_ref().and_then(|config| {
            let placement = place(config, &sources.shards);
            problems.0.extend(misplaced(&placement, &sources, is_whole));
            let checkpoint = || Checkpoint::assemble(located, config.clone(), &sources, placement.tensors);
            let checkpoint = (is_whole && placement.problems.is_empty()).then(checkpoint)?;
            problems.keep(checkpoint).map(|checkpoint| checkpoint.fingerprint().to_string())
        });

        let tokens = config.as_ref().map_or_else(TokenIds::unknown, ModelConfig::tokens);
        let text = problems.keep(Text::read_with(&dir, &tokens)).flatten();
        let generation = problems.keep(GenerationDefaults::read_with(&dir, &tokens));
        let stored = StoredSizes::of(config.as_ref(), &sources.shards);
        let files = problems.keep(files(&dir, &sources)).unwrap_or_default();
        Ok(Self { name, dir, config, stored, files, fingerprint, text, generation, problems: problems.0 })
    }
}

#[derive(Default)]
struct Problems(Vec<ModelError>);

impl Problems {
    /// What was found; an error is put to the others.
    fn keep<T>(&mut self, found: Result<T, ModelError>) -> Option<T> {
        found.map_err(|error| self.0.push(error)).ok()
    }
}

/// What is wrong with tensors, without what other problems have said already: a tensor that may be in a file that cannot be
/// read is not called missing.
fn misplaced(placement: &Placement, sources: &Sources, is_whole: bool) -> Vec<ModelError> {
    let told = |(_, error): &&(usize, TensorError)| is_whole || !matches!(error, TensorError::Missing { .. });
    placement.problems.iter().filter(told).map(|(shard, error)| sources.error(*shard, error.clone())).collect()
}

/// The files of a directory, by name. Links are followed: the hub's cache consists of them.
fn files(dir: &Path, sources: &Sources) -> Result<Vec<SurveyedFile>, ModelError> {
    let read = || ModelError::io(dir, "read the directory");
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(read())? {
        let entry = entry.map_err(read())?;
        let Some(metadata) = fs::metadata(entry.path()).ok().filter(fs::Metadata::is_file) else { continue };
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push(SurveyedFile { used: used(&name, sources), bytes: metadata.len(), name });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn used(name: &str, sources: &Sources) -> FileUse {
    let indexed = name == INDEX && !sources.is_single();
    if sources.names.contains(name) {
        FileUse::Tensors
    } else if indexed || name == GENERATION_CONFIG || DOCUMENTS.contains(&name) {
        FileUse::Document
    } else {
        FileUse::Unused
    }
}

#[cfg(test)]
mod tests;
