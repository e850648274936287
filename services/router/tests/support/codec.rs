//! A tokenizer with one token per byte.

use conclave_proto::v1::Message;
use conclave_router::TextCodec;
use conclave_serve::Error;

pub(crate) const BOS: u32 = 0;
pub(crate) const EOS: u32 = 1;
/// Token of byte 0.
const FIRST: u32 = 2;
/// Bytes, two control tokens, and ids without a string.
pub(crate) const VOCAB: usize = 300;

/// BOS, EOS, 256 bytes; the ids after them have no string.
pub(crate) struct ByteCodec;

impl ByteCodec {
    pub(crate) fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(|byte| FIRST + u32::from(byte)).collect()
    }
}

impl TextCodec for ByteCodec {
    fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok([vec![BOS], Self::ids(text)].concat())
    }

    fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        let turns: String = messages.iter().map(|message| format!("{}: {}\n", message.role, message.content)).collect();
        self.encode(&turns)
    }

    fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        match id {
            BOS => Some(b"<bos>".to_vec()),
            EOS => Some(b"<eos>".to_vec()),
            id => u8::try_from(id - FIRST).ok().map(|byte| vec![byte]),
        }
    }

    fn piece(&self, id: u32) -> Option<String> {
        self.token_bytes(id).map(|bytes| bytes.escape_ascii().to_string())
    }

    fn is_special(&self, id: u32) -> bool {
        id < FIRST
    }
}
