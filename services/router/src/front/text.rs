//! What the front asks of a tokenizer.

use conclave_model::{ChatMessage, Text, TextError};
use conclave_proto::v1::Message;
use conclave_serve::Error;

use super::detokenize::Detokenizer;

/// Text to token ids and back. `conclave_model`'s tokenizer is one; tests bring their own.
pub trait TextCodec: Send + Sync + 'static {
    /// Encodes plain text, with BOS in front where the tokenizer's config says so. Special tokens inside the text
    /// are plain text.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text.
    fn encode(&self, text: &str) -> Result<Vec<u32>, Error>;

    /// Renders the checkpoint's chat template and encodes the result; contents are plain text.
    ///
    /// # Errors
    /// When there is no template, or it refuses the messages.
    fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, Error>;

    /// The bytes that a token stands for (for a special token: of its name); `None` for an id without a string.
    fn token_bytes(&self, id: u32) -> Option<Vec<u8>>;

    /// The token as the vocabulary spells it.
    fn piece(&self, id: u32) -> Option<String>;

    /// Whether a token is a control token, which decoded text leaves out.
    fn is_special(&self, id: u32) -> bool;

    /// What a token adds to decoded text: nothing for special tokens.
    fn text_bytes(&self, id: u32) -> Vec<u8> {
        if self.is_special(id) { Vec::new() } else { self.token_bytes(id).unwrap_or_default() }
    }

    /// Decodes ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD.
    fn decode(&self, ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::default();
        let mut text: String = ids.iter().map(|&id| detokenizer.push(&self.text_bytes(id))).collect();
        text.push_str(&detokenizer.finish());
        text
    }
}

impl TextCodec for Text {
    fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        Self::encode(self, text, self.adds_bos()).map_err(refused)
    }

    fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        let message = |message: &Message| ChatMessage { role: message.role.clone(), content: message.content.clone() };
        let messages: Vec<ChatMessage> = messages.iter().map(message).collect();
        Self::encode_chat(self, &messages).map_err(refused)
    }

    fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        Self::token_bytes(self, id)
    }

    fn piece(&self, id: u32) -> Option<String> {
        Self::piece(self, id)
    }

    fn is_special(&self, id: u32) -> bool {
        Self::is_special(self, id)
    }
}

/// The tokenizer was checked when it was read: what it refuses now lies in the request.
fn refused(error: TextError) -> Error {
    Error::invalid(error.to_string())
}
