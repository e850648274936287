//! Why a tensor file or index is refused.

use crate::json::JsonError;

/// Why a tensor file or index is refused: the tensor, what was found, what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TensorError {
    /// Header or index that is no JSON, or not the JSON it should be.
    #[error("{document}: {error}")]
    Json { document: &'static str, error: JsonError },
    /// A file that ends early.
    #[error("truncated: found {found} bytes, expected at least {expected} ({part})")]
    Truncated { found: u64, expected: u64, part: &'static str },
    /// A header length that no real file has.
    #[error("header length: found {found} bytes, expected at most {limit}")]
    HeaderTooLong { found: u64, limit: u64 },
    /// Bytes that belong to no tensor, at the end.
    #[error("data: found {found} bytes, expected {expected} (the end of the last tensor)")]
    TrailingData { found: u64, expected: u64 },
    /// An element type that safetensors does not define.
    #[error("tensor {tensor}: dtype: found {found}, expected one that safetensors defines")]
    UnknownDtype { tensor: String, found: String },
    /// An element type that is not served.
    #[error("tensor {tensor}: dtype: found {found}, expected BF16 or F32")]
    UnsupportedDtype { tensor: String, found: &'static str },
    /// Scales of quantised weights of another type than all have.
    #[error("tensor {tensor}: dtype: found {found}, expected F32")]
    ScaleDtype { tensor: String, found: &'static str },
    /// Dimensions whose product is past 64 bits.
    #[error("tensor {tensor}: shape: found {found:?}, expected a product within 64 bits")]
    ShapeTooLarge { tensor: String, found: Vec<u64> },
    /// Offsets that do not hold dtype × shape.
    #[error("tensor {tensor}: misaligned: found bytes {begin}..{end}, expected {expected} bytes (dtype × shape)")]
    Misaligned { tensor: String, begin: u64, end: u64, expected: u64 },
    /// Offsets past the end of the file.
    #[error("tensor {tensor}: truncated: found {found} bytes of data in the file, expected at least {end}")]
    OutOfFile { tensor: String, found: u64, end: u64 },
    /// Two tensors over the same bytes.
    #[error("tensor {tensor}: overlaps {other}: found begin {begin}, expected at least {expected}")]
    Overlap { tensor: String, other: String, begin: u64, expected: u64 },
    /// Bytes that belong to no tensor.
    #[error("tensor {tensor}: gap before it: found begin {begin}, expected {expected}")]
    Gap { tensor: String, begin: u64, expected: u64 },
    /// A shard name that leads out of the directory.
    #[error("weight_map.{tensor}: found file name {file}, expected a name without directories")]
    UnsafeFileName { tensor: String, file: String },
    /// An index over nothing.
    #[error("weight_map: found no tensors, expected at least one")]
    EmptyIndex,
    /// A shard that the index names and that is not there.
    #[error("shard file {file}: missing, expected by the index (for {tensor})")]
    MissingShard { file: String, tensor: String },
    /// A tensor that the index puts into a shard that does not have it.
    #[error("tensor {tensor}: not in {file}, expected there by the index")]
    NotInShard { tensor: String, file: String },
    /// A tensor that no index entry leads to.
    #[error("tensor {tensor}: found in {file}, expected {expected} by the index")]
    NotInIndex { tensor: String, file: String, expected: String },
    /// Neither a single file nor an index.
    #[error("weights: found neither of model.safetensors, model.safetensors.index.json, expected one")]
    NoWeights,
    /// A tensor of the architecture that is not there.
    #[error("tensor {tensor}: missing, expected shape {expected:?}")]
    Missing { tensor: String, expected: Vec<usize> },
    /// A tensor that the architecture does not have.
    #[error("tensor {tensor}: found shape {found:?}, expected no such tensor by config.json")]
    Extra { tensor: String, found: Vec<u64> },
    /// Shared experts that the configuration denies.
    #[error("tensor {tensor}: found, expected none (n_shared_experts is null in config.json)")]
    SharedExperts { tensor: String },
    /// A tensor of another shape than the architecture gives it.
    #[error("tensor {tensor}: found shape {found:?}, expected {expected:?} by config.json")]
    Shape { tensor: String, found: Vec<u64>, expected: Vec<usize> },
    /// A gate bias that would choose no expert sensibly.
    #[error("tensor {tensor}: found {found} at {position}, expected finite numbers")]
    NonFinite { tensor: String, found: f32, position: usize },
}
