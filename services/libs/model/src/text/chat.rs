//! Chat templates, rendered so that the template's special tokens are told from special tokens in the messages.
//!
//! A conversation is rendered twice: as it is, and with every special token that the template itself writes (in its
//! source or through `bos_token` and the like) replaced by a mark that occurs nowhere in the messages. If both are the
//! same once the marks are read back, then the marks are exactly the template's tokens, and everything between them is
//! text. They differ only where a template looks for a special token within the messages; such a token is then left
//! unmarked, that is, plain text throughout.

use std::collections::BTreeSet;

use minijinja::{Environment, Value};

use super::settings::Settings;
use super::{Added, TextError, Vocabulary, environment};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`; what a template knows is its own affair.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A stretch of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// A token that the template wrote.
    Token(u32),
    /// Text, whatever it looks like.
    Text(String),
}

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// The source, cut at special tokens.
    source: Vec<Part>,
    /// `bos_token` and the like, with the special token each names.
    variables: Vec<(&'static str, Vec<Part>)>,
    /// Special tokens that the template writes.
    tokens: Vec<Added>,
}

/// Text of the template or one of its `tokens`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Token(usize),
}

/// First of the characters that stand for a token's index, after a mark.
const FIRST_INDEX: u32 = 0xf_0000;

impl ChatTemplate {
    pub(super) fn new(source: &str, settings: &Settings, vocabulary: &Vocabulary) -> Result<Self, TextError> {
        let named = [
            ("bos_token", &settings.bos),
            ("eos_token", &settings.eos),
            ("pad_token", &settings.pad),
            ("unk_token", &settings.unk),
        ];
        let named: Vec<(&str, &String)> =
            named.into_iter().filter_map(|(name, token)| Some((name, token.as_ref()?))).collect();
        let written = |added: &&Added| {
            source.contains(&added.content) || named.iter().any(|(_, token)| token.contains(&added.content))
        };
        let mut tokens: Vec<Added> = vocabulary.added().iter().filter(written).cloned().collect();
        tokens.sort_by_key(|added| std::cmp::Reverse(added.content.len()));
        let template = Self {
            environment: environment::new()?,
            source: cut(source, &tokens),
            variables: named.into_iter().map(|(name, token)| (name, cut(token, &tokens))).collect(),
            tokens,
        };
        template.check_syntax()?;
        Ok(template)
    }

    /// Compiles the source with and without marks.
    fn check_syntax(&self) -> Result<(), TextError> {
        let mark = Mark::free_in(self.template_texts())?;
        for marked in [Vec::new(), self.all()] {
            let source = self.join(&self.source, mark, &marked);
            self.environment.template_from_str(&source).map_err(|error| environment::failure(&error))?;
        }
        Ok(())
    }

    /// Renders a conversation; with `ask`, up to where the assistant's answer begins.
    pub(super) fn render(&self, messages: &[ChatMessage], ask: bool) -> Result<Vec<Piece>, TextError> {
        let said = messages.iter().flat_map(|message| [message.role.as_str(), message.content.as_str()]);
        let mark = Mark::free_in(said.clone().chain(self.template_texts()))?;
        let render = |marked: &[bool]| self.render_marked(messages, ask, mark, marked);
        let wanted = render(&[])?;
        let agrees = |rendered: &Result<String, TextError>| {
            rendered.as_ref().is_ok_and(|rendered| self.read_back(rendered, mark).as_deref() == Some(&wanted))
        };

        let mut rendered = render(&self.all());
        if !agrees(&rendered) {
            let mut marked = self.all();
            for (index, token) in self.tokens.iter().enumerate() {
                let looked_for = said.clone().any(|text| text.contains(&token.content));
                let alone: Vec<bool> = (0..self.tokens.len()).map(|other| other == index).collect();
                marked[index] = !looked_for || agrees(&render(&alone));
            }
            rendered = render(&marked);
        }
        if agrees(&rendered) { Ok(self.pieces(&rendered?, mark)) } else { Err(TextError::Ambiguous) }
    }

    fn render_marked(
        &self,
        messages: &[ChatMessage],
        ask: bool,
        mark: Mark,
        marked: &[bool],
    ) -> Result<String, TextError> {
        let message =
            |message: &ChatMessage| Value::from_pairs([("role", &*message.role), ("content", &*message.content)]);
        let context = [
            ("messages", messages.iter().map(message).collect::<Vec<_>>().into()),
            ("add_generation_prompt", Value::from(ask)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let variables = self.variables.iter().map(|(name, parts)| (*name, self.join(parts, mark, marked).into()));
        let source = self.join(&self.source, mark, marked);
        let rendered = self.environment.render_str(&source, Value::from_pairs(context.into_iter().chain(variables)));
        rendered.map_err(|error| environment::failure(&error))
    }

    fn all(&self) -> Vec<bool> {
        vec![true; self.tokens.len()]
    }

    fn template_texts(&self) -> impl Iterator<Item = &str> {
        let parts = self.source.iter().chain(self.variables.iter().flat_map(|(_, parts)| parts));
        parts.map(|part| match part {
            Part::Text(text) => text.as_str(),
            Part::Token(index) => self.tokens[*index].content.as_str(),
        })
    }

    /// Text with the tokens that are `marked` as marks and the others as they are.
    fn join(&self, parts: &[Part], mark: Mark, marked: &[bool]) -> String {
        let mut text = String::new();
        for part in parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Token(index) if marked.get(*index) == Some(&true) => text.extend(mark.of(*index)),
                Part::Token(index) => text.push_str(&self.tokens[*index].content),
            }
        }
        text
    }

    /// Rendered text with marks turned back into the tokens' strings; `None` where the template tore a mark.
    fn read_back(&self, rendered: &str, mark: Mark) -> Option<String> {
        let mut stretches = rendered.split(mark.0);
        let mut text = stretches.next()?.to_string();
        for stretch in stretches {
            let (index, rest) = mark.index(stretch)?;
            text.push_str(&self.tokens.get(index)?.content);
            text.push_str(rest);
        }
        Some(text)
    }

    /// Cuts rendered text at its marks. A token that takes white space around it gets it.
    fn pieces(&self, rendered: &str, mark: Mark) -> Vec<Piece> {
        let mut stretches = rendered.split(mark.0);
        let mut pieces = vec![Piece::Text(stretches.next().unwrap_or_default().to_string())];
        for (index, rest) in stretches.filter_map(|stretch| mark.index(stretch)) {
            let token = &self.tokens[index];
            if let (true, Some(Piece::Text(before))) = (token.lstrip, pieces.last_mut()) {
                before.truncate(before.trim_end().len());
            }
            pieces.push(Piece::Token(token.id));
            pieces.push(Piece::Text(if token.rstrip { rest.trim_start() } else { rest }.to_string()));
        }
        pieces
    }
}

/// Cuts text at special tokens, the longest first where several begin at one place.
fn cut(text: &str, tokens: &[Added]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        match tokens.iter().position(|token| rest.starts_with(&token.content)) {
            Some(index) => {
                parts.push(Part::Text(std::mem::take(&mut plain)));
                parts.push(Part::Token(index));
                rest = &rest[tokens[index].content.len()..];
            }
            None => {
                plain.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    parts.push(Part::Text(plain));
    parts
}

/// A private-use character that occurs nowhere else; with an index character after it, it stands for a token.
#[derive(Debug, Clone, Copy)]
struct Mark(char);

impl Mark {
    /// The first private-use character in none of `texts`.
    fn free_in<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Self, TextError> {
        let candidates = || ('\u{e000}'..='\u{f8ff}').chain('\u{100000}'..='\u{10fffd}');
        let private = |c: &char| matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{100000}'..='\u{10fffd}');
        let taken: BTreeSet<char> = texts.flat_map(|text| text.chars().filter(private)).collect();
        candidates().find(|c| !taken.contains(c)).map(Self).ok_or(TextError::NoFreeMark)
    }

    fn of(self, index: usize) -> impl Iterator<Item = char> {
        [Some(self.0), char::from_u32(FIRST_INDEX + index as u32)].into_iter().flatten()
    }

    /// The index at the start of what follows a mark, and the rest.
    fn index(self, stretch: &str) -> Option<(usize, &str)> {
        let first = stretch.chars().next()?;
        let index = u32::from(first).checked_sub(FIRST_INDEX).filter(|index| *index < 0xffff)?;
        Some((index as usize, &stretch[first.len_utf8()..]))
    }
}
