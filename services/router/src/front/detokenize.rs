//! Incremental detokenising: bytes of tokens in, whole characters out.

use std::str;

/// Puts characters together from the bytes of successive tokens. What it returns, one after another, is the lossy
/// UTF-8 decoding of all bytes.
#[derive(Debug, Default)]
pub(crate) struct Detokenizer {
    /// The beginning of a character that is not complete yet: at most three bytes.
    partial: Vec<u8>,
}

impl Detokenizer {
    /// Takes a token's bytes and returns the characters that are complete now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.partial.extend_from_slice(bytes);
        let (text, used) = whole_characters(&self.partial);
        self.partial.drain(..used);
        text
    }

    /// Ends the text: a character that never became complete is U+FFFD.
    pub(crate) fn finish(&mut self) -> String {
        let text = if self.partial.is_empty() { String::new() } else { char::REPLACEMENT_CHARACTER.to_string() };
        self.partial.clear();
        text
    }
}

/// The text of all that is decided, and how many bytes that is: an incomplete character at the end is not.
fn whole_characters(bytes: &[u8]) -> (String, usize) {
    let mut text = String::with_capacity(bytes.len());
    let mut used = 0;
    loop {
        match str::from_utf8(&bytes[used..]) {
            Ok(rest) => {
                text.push_str(rest);
                return (text, bytes.len());
            }
            Err(error) => {
                let valid = used + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[used..valid]));
                used = valid;
                match error.error_len() {
                    None => return (text, used),
                    Some(wrong) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        used += wrong;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_comes_out_whole() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push(&[b'a', 0xe4]), "a");
        assert_eq!(detokenizer.push(&[0xbd]), "");
        assert_eq!(detokenizer.push(&[0xa0, b'b']), "你b");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn what_stays_incomplete_is_replaced_at_the_end() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push(&[0xf0, 0x9f, 0x98]), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn pieces_add_up_to_the_lossy_decoding(bytes in byte_soup(), cuts in prop::collection::vec(0usize..8, 0..40)) {
            let mut detokenizer = Detokenizer::default();
            let (mut text, mut at) = (String::new(), 0);
            for cut in cuts {
                let end = (at + cut).min(bytes.len());
                text.push_str(&detokenizer.push(&bytes[at..end]));
                at = end;
            }
            text.push_str(&detokenizer.push(&bytes[at..]));
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn valid_text_is_never_broken(text in "\\PC{0,24}", width in 1usize..5) {
            let mut detokenizer = Detokenizer::default();
            let pieces: Vec<String> = text.as_bytes().chunks(width).map(|part| detokenizer.push(part)).collect();
            let replaced = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
            prop_assert!(replaced(&text) || !pieces.iter().any(|piece| replaced(piece)));
            prop_assert_eq!(pieces.concat(), text);
        }
    }

    /// Bytes that are text in most places and broken in some.
    fn byte_soup() -> impl Strategy<Value = Vec<u8>> {
        let part =
            prop_oneof!["[a-zé你😀]{1,3}".prop_map(String::into_bytes), prop::collection::vec(any::<u8>(), 1..3),];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }
}
