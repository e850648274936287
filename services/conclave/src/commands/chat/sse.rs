//! Server-sent events, as the HTML standard has them (section 9.2), read from pieces of any size.

/// Longest event in bytes.
const MAX_EVENT: usize = 16 << 20;

/// Puts the data of events together. Pieces may end in the middle of a line, of a line end, or of a character.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    /// Whether the last byte was a CR, so that an LF belongs to it.
    after_cr: bool,
    /// Whether a line has ended before: only the first may begin with a byte order mark.
    begun: bool,
    /// The data lines of the event so far, each with its line end.
    data: String,
}

impl SseParser {
    /// Takes the next bytes; the data of the events that they complete.
    ///
    /// # Errors
    /// When an event grows without end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, String> {
        let mut events = Vec::new();
        for &byte in bytes {
            match byte {
                b'\n' if std::mem::take(&mut self.after_cr) => {}
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    events.extend(self.end_line());
                }
                byte => {
                    self.after_cr = false;
                    self.line.push(byte);
                }
            }
        }
        if self.line.len() + self.data.len() > MAX_EVENT {
            return Err(format!("found an event of more than {MAX_EVENT} bytes, expected fewer"));
        }
        Ok(events)
    }

    /// A whole line has come; the event's data if it is an empty one.
    fn end_line(&mut self) -> Option<String> {
        let bytes = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&bytes);
        let first = !std::mem::replace(&mut self.begun, true);
        let line = if first { line.strip_prefix('\u{feff}').unwrap_or(&line) } else { &line };
        if line.is_empty() {
            let mut data = std::mem::take(&mut self.data);
            data.pop();
            return (!data.is_empty()).then_some(data);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if field == "data" {
            self.data.push_str(value.strip_prefix(' ').unwrap_or(value));
            self.data.push('\n');
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = SseParser::default();
        pieces.iter().flat_map(|piece| parser.push(piece).expect("short")).collect()
    }

    #[test]
    fn comments_and_other_fields_are_passed_over() {
        let stream = b": keep-alive\n\nevent: x\nid: 7\ndata: a\nretry: 1\n\ndata:b\ndata:  c\ndata\n\n";
        assert_eq!(read(&[stream]), ["a", "b\n c\n"]);
    }

    #[test]
    fn cutting_does_not_matter() {
        let stream = "\u{feff}data: {\"text\":\"你好é\"}\r\n\r\ndata: 2\n\ndata: 3\r\rdata: [DONE]\n\n".as_bytes();
        let whole = read(&[stream]);
        assert_eq!(whole, ["{\"text\":\"你好é\"}", "2", "3", "[DONE]"]);
        for cut in 0..=stream.len() {
            let (left, right) = stream.split_at(cut);
            assert_eq!(read(&[left, right]), whole, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(read(&bytes), whole);
    }

    #[test]
    fn an_event_without_its_end_does_not_count() {
        assert_eq!(read(&[b"data: a\n\ndata: b\n"]), ["a"]);
    }

    #[test]
    fn an_endless_event_is_an_error() {
        let mut parser = SseParser::default();
        assert!(parser.push(b"data: ").is_ok());
        let error = parser.push(&vec![b'x'; MAX_EVENT]).expect_err("too long");
        assert!(error.contains("expected fewer"), "{error}");
    }
}
