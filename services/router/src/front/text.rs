//! What the front asks of a tokenizer.

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
