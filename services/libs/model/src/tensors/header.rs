//! The header of a safetensors file: a length of 8 bytes, then JSON `{name: {dtype, shape, data_offsets}}`.

use serde_json::Value;

use super::TensorError;
use crate::json::{self, Fields, JsonError};

/// Bytes of the header's length at the start of a file.
pub(crate) const HEADER_PREFIX: u64 = 8;

/// Longest header taken; the format's own limit.
const HEADER_LIMIT: u64 = 100_000_000;

/// Element types of the format, with their bytes. The types of less than a byte are left out: nothing here reads them.
const DTYPES: [(&str, u64); 17] = [
    ("BF16", 2),
    ("F32", 4),
    ("F16", 2),
    ("F64", 8),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F8_E8M0", 1),
    ("C64", 8),
    ("I64", 8),
    ("I32", 4),
    ("I16", 2),
    ("I8", 1),
    ("U64", 8),
    ("U32", 4),
    ("U16", 2),
    ("U8", 1),
    ("BOOL", 1),
];

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// As the format spells it.
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<u64>,
    /// First byte, from the end of the header.
    pub(crate) begin: u64,
    /// One past the last byte, from the end of the header.
    pub(crate) end: u64,
}

/// Bytes of the JSON header, from a file's first 8 bytes and its length.
pub(crate) fn header_bytes(prefix: [u8; 8], file_bytes: u64) -> Result<u64, TensorError> {
    let length = u64::from_le_bytes(prefix);
    if length > HEADER_LIMIT {
        return Err(TensorError::HeaderTooLong { found: length, limit: HEADER_LIMIT });
    }
    let expected = HEADER_PREFIX + length;
    if file_bytes < expected {
        return Err(TensorError::Truncated { found: file_bytes, expected, part: "header" });
    }
    Ok(length)
}

/// Entries of a header in the order of their bytes, which must cover the `data_bytes` after the header exactly.
/// Offsets need not be multiples of the element's size.
pub(crate) fn parse(header: &[u8], data_bytes: u64) -> Result<Vec<Entry>, TensorError> {
    let document = json::object(header).map_err(in_header)?;
    let mut entries = Vec::with_capacity(document.len());
    for (name, value) in document.iter().filter(|(name, _)| *name != "__metadata__") {
        entries.push(entry(name, value)?);
    }
    entries.sort_by_key(|entry| (entry.begin, entry.end));
    check_cover(&entries, data_bytes)?;
    Ok(entries)
}

fn in_header(error: JsonError) -> TensorError {
    TensorError::Json { document: "header", error }
}

fn entry(name: &str, value: &Value) -> Result<Entry, TensorError> {
    let Some(map) = value.as_object() else {
        let (field, found) = (name.to_string(), json::describe(value));
        return Err(in_header(JsonError::WrongType { field, found, expected: "an object".into() }));
    };
    let fields = Fields::nested(name, map);
    let given = fields.required_text("dtype").map_err(in_header)?;
    let Some(&(dtype, size)) = DTYPES.iter().find(|(dtype, _)| *dtype == given) else {
        return Err(TensorError::UnknownDtype { tensor: name.into(), found: json::quote(given) });
    };
    let shape = integers(&fields, "shape").map_err(in_header)?;
    let offsets = integers(&fields, "data_offsets").map_err(in_header)?;
    let &[begin, end] = offsets.as_slice() else {
        let found = format!("an array of {}", offsets.len());
        let field = fields.path("data_offsets");
        return Err(in_header(JsonError::WrongType { field, found, expected: "two integers".into() }));
    };
    let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    let Some(expected) = elements.and_then(|elements| elements.checked_mul(size)) else {
        return Err(TensorError::ShapeTooLarge { tensor: name.into(), found: shape });
    };
    if begin.checked_add(expected) != Some(end) {
        return Err(TensorError::Misaligned { tensor: name.into(), begin, end, expected });
    }
    Ok(Entry { name: name.into(), dtype, shape, begin, end })
}

fn integers(fields: &Fields<'_>, key: &str) -> Result<Vec<u64>, JsonError> {
    let array = fields.array(key)?.ok_or_else(|| fields.missing(key, "an array of integers"))?;
    array.iter().map(|value| json::integer(&fields.path(key), value, 0..=u64::MAX)).collect()
}

fn check_cover(entries: &[Entry], data_bytes: u64) -> Result<(), TensorError> {
    let mut covered = 0;
    let mut last = "the header";
    for Entry { name, begin, end, .. } in entries {
        let (tensor, begin) = (name.clone(), *begin);
        if begin < covered {
            return Err(TensorError::Overlap { tensor, other: last.into(), begin, expected: covered });
        }
        if begin > covered {
            return Err(TensorError::Gap { tensor, begin, expected: covered });
        }
        if *end > data_bytes {
            return Err(TensorError::OutOfFile { tensor, found: data_bytes, end: *end });
        }
        covered = *end;
        last = name;
    }
    if covered < data_bytes {
        return Err(TensorError::TrailingData { found: data_bytes, expected: covered });
    }
    Ok(())
}
