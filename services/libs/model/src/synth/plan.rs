//! Which tensor goes into which file, at which byte.

use serde_json::{Map, Value, json};

use crate::ModelConfig;
use crate::tensors::{Expected, FP8, expected, may_be_fp8, scales};

/// One file to be written.
#[derive(Debug)]
pub(super) struct ShardPlan {
    pub(super) file: String,
    /// Length and JSON, padded to 8 bytes.
    pub(super) header: Vec<u8>,
    tensors: Vec<Planned>,
}

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// bf16, of norms.
    Ones,
    /// bf16, of matrices.
    Normal,
    /// The same in e4m3.
    Fp8,
    /// f32, of matrices in e4m3.
    Scales,
}

impl Content {
    /// As the format spells the element type, and bytes of an element.
    fn element(self) -> (&'static str, u64) {
        match self {
            Self::Ones | Self::Normal => ("BF16", 2),
            Self::Fp8 => (FP8, 1),
            Self::Scales => ("F32", 4),
        }
    }
}

#[derive(Debug)]
struct Planned {
    name: String,
    content: Content,
    shape: Vec<usize>,
    /// From the end of the header.
    begin: u64,
    bytes: u64,
}

/// Bytes that are made and written at once.
#[derive(Debug)]
pub(super) struct Chunk<'a> {
    pub(super) name: &'a str,
    pub(super) content: Content,
    /// Elements before it in the tensor.
    pub(super) first: u64,
    /// From the end of the header.
    pub(super) begin: u64,
    pub(super) bytes: u64,
}

impl ShardPlan {
    fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |tensor| tensor.begin + tensor.bytes)
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes()
    }

    /// The file's data in pieces of at most `limit` bytes, none across tensors.
    pub(super) fn chunks(&self, limit: u64) -> Vec<Chunk<'_>> {
        let pieces = |tensor: &Planned| (0..tensor.bytes.div_ceil(limit)).map(move |index| index * limit);
        let chunks = self.tensors.iter().flat_map(|tensor| {
            pieces(tensor).map(|offset| Chunk {
                name: &tensor.name,
                content: tensor.content,
                first: offset / tensor.content.element().1,
                begin: tensor.begin + offset,
                bytes: limit.min(tensor.bytes - offset),
            })
        });
        chunks.collect()
    }
}

/// Fills files in the order of a token's way; one ends where the next tensor would take it past `limit` bytes.
pub(super) fn plan(config: &ModelConfig, limit: u64) -> Vec<ShardPlan> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut end = 0;
    for (tensor, content) in expected(config).flat_map(|tensor| contents(config, tensor)) {
        let bytes = tensor.shape.iter().product::<usize>() as u64 * content.element().1;
        if end > 0 && end + bytes > limit {
            shards.push(Vec::new());
            end = 0;
        }
        let planned = Planned { name: tensor.name, content, shape: tensor.shape, begin: end, bytes };
        if let Some(shard) = shards.last_mut() {
            shard.push(planned);
        }
        end += bytes;
    }
    let count = shards.len();
    let shard = |(index, tensors): (usize, Vec<Planned>)| ShardPlan {
        file: file_name(index, count),
        header: header(&tensors),
        tensors,
    };
    shards.into_iter().enumerate().map(shard).collect()
}

/// A tensor, and its scales if it is to be in FP8.
fn contents(config: &ModelConfig, tensor: Expected) -> Vec<(Expected, Content)> {
    match config.quantization {
        Some(block) if may_be_fp8(&tensor) => {
            let scales = scales(&tensor, block);
            vec![(tensor, Content::Fp8), (scales, Content::Scales)]
        }
        _ if tensor.shape.len() == 1 => vec![(tensor, Content::Ones)],
        _ => vec![(tensor, Content::Normal)],
    }
}

fn file_name(index: usize, count: usize) -> String {
    if count == 1 { "model.safetensors".into() } else { format!("model-{:05}-of-{count:06}.safetensors", index + 1) }
}

fn header(tensors: &[Planned]) -> Vec<u8> {
    let entry = |tensor: &Planned| {
        let offsets = [tensor.begin, tensor.begin + tensor.bytes];
        (
            tensor.name.clone(),
            json!({"dtype": tensor.content.element().0, "shape": tensor.shape, "data_offsets": offsets}),
        )
    };
    let mut text = Value::Object(tensors.iter().map(entry).collect::<Map<_, _>>()).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    (text.len() as u64).to_le_bytes().into_iter().chain(text.into_bytes()).collect()
}

/// The text of the index; `None` for a single file, which has none.
pub(super) fn index(shards: &[ShardPlan]) -> Option<String> {
    if shards.len() == 1 {
        return None;
    }
    let total: u64 = shards.iter().map(ShardPlan::data_bytes).sum();
    let places = shards.iter().flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor.name.clone(), &shard.file)));
    let map: Map<String, Value> = places.map(|(name, file)| (name, json!(file))).collect();
    Some(format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": map})))
}
