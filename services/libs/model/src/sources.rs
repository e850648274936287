//! The tensor files of a checkpoint, open, with their headers read.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::sys::Mapping;
use crate::tensors::{HEADER_PREFIX, Index, Shard, TensorError, header_bytes, parse_header};
use crate::{ModelError, files};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The open tensor files of a checkpoint.
#[derive(Default)]
pub(crate) struct Sources {
    /// Names of all files that have tensors of the checkpoint, readable or not.
    pub(crate) names: BTreeSet<String>,
    paths: Vec<PathBuf>,
    pub(crate) files: Vec<File>,
    pub(crate) shards: Vec<Shard>,
}

impl Sources {
    /// Opens the files of a directory.
    pub(crate) fn open(dir: &Path) -> Result<Self, ModelError> {
        let (sources, problems) = Self::open_readable(dir);
        problems.into_iter().next().map_or(Ok(sources), Err)
    }

    /// Opens the files of a directory that can be read; what is wrong with the others, in the order of their names.
    pub(crate) fn open_readable(dir: &Path) -> (Self, Vec<ModelError>) {
        let mut sources = Self::default();
        let single = dir.join(SINGLE);
        let problems = if single.is_file() {
            sources.names.insert(SINGLE.into());
            let opened = File::open(&single).map_err(ModelError::io(&single, "open"));
            let pushed = opened.and_then(|file| sources.push(single, file).map(drop));
            pushed.err().into_iter().collect()
        } else {
            sources.open_indexed(dir).unwrap_or_else(|error| vec![error])
        };
        (sources, problems)
    }

    /// Whether all tensors are in one file, so that no index is read.
    pub(crate) fn is_single(&self) -> bool {
        self.names.contains(SINGLE)
    }

    /// Opens every file that the index names.
    fn open_indexed(&mut self, dir: &Path) -> Result<Vec<ModelError>, ModelError> {
        let path = dir.join(INDEX);
        let Some(text) = files::read_optional(&path)? else {
            return Err(ModelError::Tensor { path: dir.to_path_buf(), error: TensorError::NoWeights });
        };
        let index = Index::parse(&text).map_err(ModelError::tensor(&path))?;
        self.names.extend(index.shards().map(|(name, _)| name.to_string()));
        let mut open = |(name, tensor): (&str, &str)| {
            let shard = dir.join(name);
            let file = File::open(&shard).map_err(|cause| missing_shard(&path, &shard, name, tensor, cause))?;
            let shard = self.push(shard, file)?;
            index.check_shard(name, &shard.entries).map_err(ModelError::tensor(&path))
        };
        Ok(index.shards().filter_map(|shard| open(shard).err()).collect())
    }

    /// Reads the header of a file and keeps both.
    fn push(&mut self, path: PathBuf, file: File) -> Result<&Shard, ModelError> {
        let shard = read_header(&path, &file)?;
        self.paths.push(path);
        self.files.push(file);
        self.shards.push(shard);
        Ok(&self.shards[self.shards.len() - 1])
    }

    pub(crate) fn map(&self) -> Result<Vec<Mapping>, ModelError> {
        let map = |(path, file): (&PathBuf, &File)| Mapping::new(file).map_err(ModelError::io(path, "map"));
        self.paths.iter().zip(&self.files).map(map).collect()
    }

    pub(crate) fn error(&self, shard: usize, error: TensorError) -> ModelError {
        ModelError::Tensor { path: self.paths[shard].clone(), error }
    }

    pub(crate) fn io_error(&self, shard: usize, action: &'static str, cause: io::Error) -> ModelError {
        ModelError::Io { path: self.paths[shard].clone(), action, cause }
    }
}

fn missing_shard(index: &Path, shard: &Path, name: &str, tensor: &str, cause: io::Error) -> ModelError {
    if cause.kind() != io::ErrorKind::NotFound {
        return ModelError::io(shard, "open")(cause);
    }
    ModelError::tensor(index)(TensorError::MissingShard { file: name.into(), tensor: tensor.into() })
}

fn read_header(path: &Path, file: &File) -> Result<Shard, ModelError> {
    let io = |action| ModelError::io(path, action);
    let file_bytes = file.metadata().map_err(io("read the length"))?.len();
    if file_bytes < HEADER_PREFIX {
        let error = TensorError::Truncated { found: file_bytes, expected: HEADER_PREFIX, part: "length of the header" };
        return Err(ModelError::tensor(path)(error));
    }
    let mut prefix = [0; HEADER_PREFIX as usize];
    file.read_exact_at(&mut prefix, 0).map_err(io("read the length of the header"))?;
    let length = header_bytes(prefix, file_bytes).map_err(ModelError::tensor(path))?;
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, HEADER_PREFIX).map_err(io("read the header"))?;
    let data_begin = HEADER_PREFIX + length;
    let entries = parse_header(&header, file_bytes - data_begin).map_err(ModelError::tensor(path))?;
    Ok(Shard { entries, data_begin })
}
