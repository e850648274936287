//! Text to token ids and back: tokenizer.json, tokenizer_config.json and the checkpoint's own chat template.
//!
//! Text never becomes a special token. Only the chat template writes those; what it is given stays text, whatever it
//! says.

mod chat;
mod clock;
mod environment;
mod error;
mod plain;
mod python;
mod settings;
mod vocabulary;

use std::path::Path;

use tokenizers::Tokenizer;

pub use chat::ChatMessage;
use chat::ChatTemplate;
pub use error::TextError;
use settings::Settings;
use vocabulary::{Added, Vocabulary};

use crate::checkpoint::Checkpoint;
use crate::config::TokenIds;
use crate::{ModelConfig, ModelError, files, json};

/// A tokenizer with its chat template.
#[derive(Debug)]
pub struct Text {
    vocabulary: Vocabulary,
    /// The tokenizer without its added tokens.
    plain: Tokenizer,
    template: Option<ChatTemplate>,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
}

impl Checkpoint {
    /// The tokenizer; `None` where the checkpoint has no `tokenizer.json`.
    ///
    /// # Errors
    /// Names the file, what was found in it and what was expected.
    pub fn text(&self) -> Result<Option<Text>, ModelError> {
        Text::read(self.dir(), self.config())
    }
}

impl Text {
    /// Reads the tokenizer of a checkpoint directory.
    ///
    /// # Errors
    /// As for [`Checkpoint::text`].
    pub fn read(dir: &Path, config: &ModelConfig) -> Result<Option<Self>, ModelError> {
        Self::read_with(dir, &config.tokens())
    }

    pub(crate) fn read_with(dir: &Path, tokens: &TokenIds) -> Result<Option<Self>, ModelError> {
        let path = dir.join("tokenizer.json");
        let Some(text) = files::read_optional(&path)? else { return Ok(None) };
        let document = json::object(&text).map_err(ModelError::json(&path))?;
        let at_tokenizer = |error| ModelError::Text { path: path.clone(), error };
        let vocabulary = Vocabulary::read(&document, tokens.vocab).map_err(at_tokenizer)?;
        let plain = plain::tokenizer(document, &vocabulary).map_err(at_tokenizer)?;

        let settings = Settings::read(dir)?;
        let at_settings = |error| ModelError::Text { path: dir.join("tokenizer_config.json"), error };
        let id = |token: &Option<String>, field, given: Option<u32>| match token {
            None => Ok(given.filter(|id| vocabulary.has(*id))),
            Some(token) => vocabulary.id(token).map(Some).ok_or_else(|| TextError::unknown_token(field, token)),
        };
        let bos = id(&settings.bos, "bos_token", tokens.bos).map_err(at_settings)?;
        let eos = id(&settings.eos, "eos_token", tokens.eos.first().copied()).map_err(at_settings)?;
        if settings.adds_bos && bos.is_none() {
            return Err(at_settings(TextError::NoBos));
        }
        let template = settings.template.as_ref().map(|source| ChatTemplate::new(source, &settings, &vocabulary));
        let template = template.transpose().map_err(|error| ModelError::Text { path: settings.path, error })?;
        Ok(Some(Self { vocabulary, plain, template, bos, eos, adds_bos: settings.adds_bos }))
    }

    /// Token ids of a text, after BOS where `add_bos`. No id in it is that of a special token but BOS.
    ///
    /// # Errors
    /// When BOS is asked for and there is none.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        if add_bos {
            ids.push(self.bos.ok_or(TextError::NoBos)?);
        }
        plain::encode(&self.plain, text, &mut ids)?;
        Ok(ids)
    }

    /// Token ids of a conversation that asks for the assistant's next message.
    ///
    /// # Errors
    /// When there is no chat template or it refuses the conversation.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, TextError> {
        self.encode_conversation(messages, true)
    }

    fn encode_conversation(&self, messages: &[ChatMessage], ask: bool) -> Result<Vec<u32>, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoChatTemplate)?;
        let mut ids = Vec::new();
        for piece in template.render(messages, ask)? {
            match piece {
                chat::Piece::Token(id) => ids.push(id),
                chat::Piece::Text(text) => plain::encode(&self.plain, &text, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Text of token ids; bytes that are no UTF-8 become U+FFFD, special tokens their own strings.
    ///
    /// # Errors
    /// When an id has no string.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        let mut bytes = Vec::new();
        for id in ids {
            bytes.extend(self.token_bytes(*id).ok_or(TextError::NoString { id: *id })?);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes that a token stands for, which need not be whole characters; `None` where the id has no string.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.vocabulary.bytes(id)
    }

    /// One token as text, bytes that are no UTF-8 as U+FFFD; `None` where the id has no string.
    pub fn piece(&self, id: u32) -> Option<String> {
        self.token_bytes(id).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// One past the highest id that has a string: at most the rows of lm_head.
    pub fn real_vocab(&self) -> usize {
        self.vocabulary.len()
    }

    /// How many ids have a string.
    pub fn strings(&self) -> usize {
        self.vocabulary.strings()
    }

    /// Whether an id has a string; one that has none must not be sampled.
    pub fn has_string(&self, id: u32) -> bool {
        self.vocabulary.has(id)
    }

    /// Whether an id is marked special, and so left out of what a reader sees.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether text prompts begin with BOS (`add_bos_token`). Chat templates write their own.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }
}

#[cfg(test)]
mod tests;
