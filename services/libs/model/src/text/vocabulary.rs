//! Strings and bytes of token ids.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::TextError;
use crate::json::{self, Fields};

/// An added token: matched as a whole, never made by the model's merges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) id: u32,
    pub(super) content: String,
    /// Left out of what a reader sees.
    pub(super) special: bool,
    /// Takes the white space before it.
    pub(super) lstrip: bool,
    /// Takes the white space after it.
    pub(super) rstrip: bool,
}

/// What an id stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// A string of the byte alphabet.
    Bytes(String),
    Added {
        content: String,
        special: bool,
    },
}

impl Piece {
    fn string(&self) -> &str {
        match self {
            Self::Bytes(text) | Self::Added { content: text, .. } => text,
        }
    }
}

/// All strings of a tokenizer, by id.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pieces: Vec<Option<Piece>>,
    added: Vec<Added>,
    /// Byte of each character of the byte alphabet.
    alphabet: HashMap<char, u8>,
}

impl Vocabulary {
    /// Reads the strings of a `tokenizer.json`, whose ids must be below `vocab`.
    pub(super) fn read(document: &Map<String, Value>, vocab: usize) -> Result<Self, TextError> {
        let root = Fields::root(document);
        check_decoder(&root)?;
        let mut vocabulary = Self { pieces: Vec::new(), added: read_added(&root)?, alphabet: alphabet() };
        for added in vocabulary.added.clone() {
            let piece = Piece::Added { content: added.content, special: added.special };
            vocabulary.insert(added.id, piece, vocab)?;
        }
        let model = root.object("model")?.ok_or_else(|| root.missing("model", "an object"))?;
        let strings = model.object("vocab")?.ok_or_else(|| model.missing("vocab", "an object of string: id"))?;
        for (string, id) in strings.entries() {
            let id = json::integer(&strings.path(string), id, 0..=u64::from(u32::MAX))? as u32;
            vocabulary.insert(id, Piece::Bytes(string.clone()), vocab)?;
        }
        Ok(vocabulary)
    }

    /// Added tokens come first: where the model has one too, it stays an added token.
    fn insert(&mut self, id: u32, piece: Piece, vocab: usize) -> Result<(), TextError> {
        let index = id as usize;
        if index >= vocab {
            return Err(TextError::IdPastVocab { token: json::quote(piece.string()), id, vocab });
        }
        if index >= self.pieces.len() {
            self.pieces.resize(index + 1, None);
        }
        match &self.pieces[index] {
            None => self.pieces[index] = Some(piece),
            Some(other) if other.string() == piece.string() => (),
            Some(other) => {
                let (token, other) = (json::quote(piece.string()), json::quote(other.string()));
                return Err(TextError::IdTaken { token, id, other });
            }
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn strings(&self) -> usize {
        self.pieces.iter().flatten().count()
    }

    pub(super) fn added(&self) -> &[Added] {
        &self.added
    }

    fn piece(&self, id: u32) -> Option<&Piece> {
        self.pieces.get(id as usize)?.as_ref()
    }

    pub(super) fn has(&self, id: u32) -> bool {
        self.piece(id).is_some()
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        matches!(self.piece(id), Some(Piece::Added { special: true, .. }))
    }

    /// The id of a string as the file spells it.
    pub(super) fn id(&self, string: &str) -> Option<u32> {
        let is = |piece: &Option<Piece>| piece.as_ref().is_some_and(|piece| piece.string() == string);
        self.pieces.iter().position(is).map(|index| index as u32)
    }

    /// The bytes an id stands for. A string with a character outside the byte alphabet stands for itself.
    pub(super) fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        match self.piece(id)? {
            Piece::Added { content, .. } => Some(content.clone().into_bytes()),
            Piece::Bytes(text) => {
                let bytes: Option<Vec<u8>> = text.chars().map(|c| self.alphabet.get(&c).copied()).collect();
                Some(bytes.unwrap_or_else(|| text.clone().into_bytes()))
            }
        }
    }
}

fn check_decoder(root: &Fields<'_>) -> Result<(), TextError> {
    let kind = match root.object("decoder")? {
        Some(decoder) => decoder.text("type")?,
        None => None,
    };
    match kind {
        Some("ByteLevel") => Ok(()),
        other => Err(TextError::Decoder { found: other.map_or("nothing".into(), json::quote) }),
    }
}

fn read_added(root: &Fields<'_>) -> Result<Vec<Added>, TextError> {
    let Some(items) = root.array("added_tokens")? else { return Ok(Vec::new()) };
    items.iter().enumerate().map(|(index, item)| added(&format!("added_tokens[{index}]"), item)).collect()
}

fn added(path: &str, item: &Value) -> Result<Added, TextError> {
    let Some(map) = item.as_object() else {
        let (field, found) = (path.to_string(), json::describe(item));
        return Err(json::JsonError::WrongType { field, found, expected: "an object".into() }.into());
    };
    let fields = Fields::nested(path, map);
    let content = fields.required_text("content")?;
    if content.is_empty() {
        return Err(fields.out_of_range("content", "\"\"", "a string of at least one character").into());
    }
    let flag = |key| Ok::<_, json::JsonError>(fields.flag(key)?.unwrap_or(false));
    Ok(Added {
        id: fields.required_integer("id", 0..=u64::from(u32::MAX))? as u32,
        content: content.into(),
        special: flag("special")?,
        lstrip: flag("lstrip")?,
        rstrip: flag("rstrip")?,
    })
}

/// The byte alphabet: printable Latin-1 characters stand for their own byte, the other bytes, in order, for the
/// characters from U+0100 on.
fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let own = (0..=255).filter(|byte| printable(*byte)).map(|byte| (char::from(byte), byte));
    let shifted = (0..=255).filter(|byte| !printable(*byte)).zip('\u{100}'..).map(|(byte, c)| (c, byte));
    own.chain(shifted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_has_every_byte_once() {
        let alphabet = alphabet();
        let bytes: std::collections::BTreeSet<u8> = alphabet.values().copied().collect();
        assert_eq!((alphabet.len(), bytes.len()), (256, 256));
        assert_eq!((alphabet[&'Ġ'], alphabet[&'Ċ'], alphabet[&'a']), (b' ', b'\n', b'a'));
    }
}
