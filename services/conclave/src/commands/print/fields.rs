//! Named values, one below the other.

use super::{Ink, Style};

/// Keeps the words of a text together when it is wrapped.
pub fn together(text: &str) -> String {
    text.replace(' ', NO_BREAK)
}

const NO_BREAK: &str = "\u{a0}";

/// Lines of `name  value`, the values aligned behind at least `names` characters and wrapped at words to `width`.
pub fn fields(entries: &[(&str, String)], names: usize, width: usize, style: Style) -> String {
    let names = entries.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(names);
    let mut text = String::new();
    for (name, value) in entries {
        let mut lead = style.paint(Ink::Dim, &format!("{name:names$}"));
        for line in wrap(value, width.saturating_sub(names + 2)) {
            text.push_str(format!("{lead}  {}", line.replace(NO_BREAK, " ")).trim_end());
            text.push('\n');
            lead = " ".repeat(names);
        }
    }
    text
}

/// Lines of at most `width` characters, broken between words; a longer word gets a line of its own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let used = lines.last().map_or(0, |line| line.chars().count());
        if used > 0 && used + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            let gap = if line.is_empty() { "" } else { " " };
            line.push_str(gap);
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned_and_wrapped() {
        let entries = [("a", "one two three".to_owned()), ("long", "x".to_owned()), ("none", String::new())];
        assert_eq!(fields(&entries, 0, 14, Style::PLAIN), "a     one two\n      three\nlong  x\nnone\n");
        let kept = [("a", together("one two") + " three")];
        assert_eq!(fields(&kept, 3, 9, Style::PLAIN), "a    one two\n     three\n");
    }

    #[test]
    fn a_word_wider_than_the_line_is_kept_whole() {
        assert_eq!(wrap("a bcdefgh i", 4), ["a", "bcdefgh", "i"]);
        assert_eq!(wrap("", 4), [""]);
    }
}
