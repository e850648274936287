//! The tokenizer of plain text: the checkpoint's own, without its added tokens.

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::{TextError, Vocabulary};

/// Builds a tokenizer that cannot yield an added token: it neither looks for their strings nor knows them as words.
pub(super) fn tokenizer(mut document: Map<String, Value>, vocabulary: &Vocabulary) -> Result<Tokenizer, TextError> {
    for unused in ["post_processor", "truncation", "padding"] {
        document.insert(unused.into(), Value::Null);
    }
    document.insert("added_tokens".into(), Value::Array(Vec::new()));
    let strings = document.get_mut("model").and_then(|model| model.get_mut("vocab")).and_then(Value::as_object_mut);
    if let Some(strings) = strings {
        strings.retain(|string, _| vocabulary.added().iter().all(|added| added.content != *string));
    }
    let refuse = |reason: String| TextError::Tokenizer { reason };
    let text = serde_json::to_vec(&document).map_err(|error| refuse(error.to_string()))?;
    Tokenizer::from_bytes(text).map_err(|error| refuse(error.to_string()))
}

/// Appends the ids of `text`.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
    if text.is_empty() {
        return Ok(());
    }
    let encoding = tokenizer.encode_fast(text, false);
    let encoding = encoding.map_err(|error| TextError::Tokenizer { reason: error.to_string() })?;
    ids.extend_from_slice(encoding.get_ids());
    Ok(())
}
