//! What can go wrong between text and token ids.

use crate::json::{JsonError, quote};

/// Why a tokenizer or chat template is refused, or a text cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A document that is not what it should be.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// A tokenizer that does not work on bytes.
    #[error("decoder.type: found {found}, expected \"ByteLevel\"")]
    Decoder { found: String },
    /// A token id past the rows of the embedding.
    #[error("token {token}: found id {id}, expected less than vocab_size = {vocab} of config.json")]
    IdPastVocab { token: String, id: u32, vocab: usize },
    /// Two strings with one id.
    #[error("token {token}: found id {id}, which is that of {other}, expected an id of its own")]
    IdTaken { token: String, id: u32, other: String },
    /// A named token that the tokenizer does not have.
    #[error("{field}: found {token}, expected a token of tokenizer.json")]
    UnknownToken { field: &'static str, token: String },
    /// BOS is to be added and there is none.
    #[error("bos_token: missing, expected one (add_bos_token is set or BOS was asked for)")]
    NoBos,
    /// The tokenizer library refuses the tokenizer.
    #[error("tokenizer: {reason}")]
    Tokenizer { reason: String },
    /// A chat without a chat template.
    #[error("chat template: missing, expected chat_template in tokenizer_config.json or chat_template.jinja")]
    NoChatTemplate,
    /// A template that does not compile or fails.
    #[error("chat template: {reason}")]
    Template { reason: String },
    /// The template refuses the conversation, in its own words.
    #[error("chat template refused the messages: {reason}")]
    Refused { reason: String },
    /// A conversation whose text is not told from the template's special tokens.
    #[error("chat template: its special tokens cannot be told from those in the messages")]
    Ambiguous,
    /// A conversation with every character that could serve as a mark.
    #[error("messages: found every private-use character of Unicode, expected at least one to be free")]
    NoFreeMark,
    /// A token id without a string.
    #[error("token id {id}: found no string for it in the tokenizer")]
    NoString { id: u32 },
}

impl TextError {
    pub(super) fn unknown_token(field: &'static str, token: &str) -> Self {
        Self::UnknownToken { field, token: quote(token) }
    }
}
