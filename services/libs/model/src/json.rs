//! Strict reading of JSON: syntax errors with their place, fields with what was found and what was expected.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// What is wrong with a JSON document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not JSON, or a key given twice.
    #[error("line {line}, column {column}: {reason}")]
    Malformed { line: usize, column: usize, reason: String },
    /// A key that must be there.
    #[error("{field}: missing, expected {expected}")]
    Missing { field: String, expected: String },
    /// A value of another type.
    #[error("{field}: found {found}, expected {expected}")]
    WrongType { field: String, found: String, expected: String },
    /// A number of the right type outside its bounds.
    #[error("{field}: found {found}, expected {expected}")]
    OutOfRange { field: String, found: String, expected: String },
}

/// Parses a document that must be one object; a key given twice anywhere is refused.
pub(crate) fn object(text: &[u8]) -> Result<Map<String, Value>, JsonError> {
    let Strict(value) = serde_json::from_slice(text).map_err(|error| malformed(&error))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(JsonError::WrongType {
            field: "document".into(),
            found: describe(&other),
            expected: "an object".into(),
        }),
    }
}

fn malformed(error: &serde_json::Error) -> JsonError {
    let message = error.to_string();
    let reason = message.split(" at line ").next().unwrap_or(&message).to_string();
    JsonError::Malformed { line: error.line(), column: error.column(), reason }
}

/// A value in a few words, for error messages.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => quote(text),
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
    }
}

/// A string quoted and cut to a length that fits a message.
pub(crate) fn quote(text: &str) -> String {
    const SHOWN: usize = 60;
    if text.chars().count() <= SHOWN {
        return format!("{text:?}");
    }
    let start: String = text.chars().take(SHOWN).collect();
    format!("{start:?}… ({} bytes)", text.len())
}

/// Typed access to the fields of one object. A field that is null counts as absent.
pub(crate) struct Fields<'a> {
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of a document.
    pub(crate) fn root(map: &'a Map<String, Value>) -> Self {
        Self { prefix: String::new(), map }
    }

    /// The fields of an object inside a document; messages name them `path.key`.
    pub(crate) fn nested(path: &str, map: &'a Map<String, Value>) -> Self {
        Self { prefix: format!("{path}."), map }
    }

    /// The key as messages name it.
    pub(crate) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Whether the key is there at all, null included.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value, if there and not null.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An integer within `range`.
    pub(crate) fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, JsonError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        integer(&self.path(key), value, range).map(Some)
    }

    /// An integer within `range` that must be there.
    pub(crate) fn required_integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<u64, JsonError> {
        let expected = format!("an integer in {}..={}", range.start(), range.end());
        self.integer(key, range)?.ok_or_else(|| self.missing(key, &expected))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, JsonError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, value, "a finite number")),
        }
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, JsonError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, JsonError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, value, "a string"))
    }

    /// A string that must be there.
    pub(crate) fn required_text(&self, key: &str) -> Result<&'a str, JsonError> {
        self.text(key)?.ok_or_else(|| self.missing(key, "a string"))
    }

    /// An array.
    pub(crate) fn array(&self, key: &str) -> Result<Option<&'a Vec<Value>>, JsonError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_array().map(Some).ok_or_else(|| self.wrong(key, value, "an array"))
    }

    /// An object.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields<'a>>, JsonError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Fields::nested(&self.path(key), map))),
            None => Err(self.wrong(key, value, "an object")),
        }
    }

    /// Key and value of every field.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.map.iter()
    }

    pub(crate) fn missing(&self, key: &str, expected: &str) -> JsonError {
        JsonError::Missing { field: self.path(key), expected: expected.into() }
    }

    pub(crate) fn wrong(&self, key: &str, value: &Value, expected: &str) -> JsonError {
        JsonError::WrongType { field: self.path(key), found: describe(value), expected: expected.into() }
    }

    pub(crate) fn out_of_range(&self, key: &str, found: impl fmt::Display, expected: &str) -> JsonError {
        JsonError::OutOfRange { field: self.path(key), found: found.to_string(), expected: expected.into() }
    }
}

/// One value as an integer within `range`.
pub(crate) fn integer(field: &str, value: &Value, range: RangeInclusive<u64>) -> Result<u64, JsonError> {
    let expected = format!("an integer in {}..={}", range.start(), range.end());
    match value.as_u64() {
        Some(number) if range.contains(&number) => Ok(number),
        _ if value.is_number() => Err(JsonError::OutOfRange { field: field.into(), found: describe(value), expected }),
        _ => Err(JsonError::WrongType { field: field.into(), found: describe(value), expected }),
    }
}

/// A token id or a list of them; absent and null are an empty list.
pub(crate) fn token_ids(fields: &Fields<'_>, key: &str) -> Result<Vec<u32>, JsonError> {
    let id = |value| integer(&fields.path(key), value, 0..=u64::from(u32::MAX)).map(|id| id as u32);
    match fields.value(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

/// A JSON value none of whose objects has a key twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Bool(flag))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::from(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::from(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::from(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::String(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let Strict(value) = entries.next_value()?;
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("key {} is given twice", quote(&key))));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syntax_error_names_its_place() {
        let error = object(b"{\n  \"a\": 1,\n  oops\n}").unwrap_err();
        assert!(matches!(error, JsonError::Malformed { line: 3, column: 3, .. }), "{error}");
    }

    #[test]
    fn a_key_given_twice_is_refused_at_any_depth() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"b":[{"a":1,"a":2}]}"#] {
            let error = object(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("\"a\" is given twice"), "{error}");
        }
    }

    #[test]
    fn invalid_utf8_is_malformed() {
        assert!(matches!(object(b"{\"\xff\": 1}"), Err(JsonError::Malformed { .. })));
    }

    #[test]
    fn long_strings_are_cut_in_messages() {
        let message = quote(&"é".repeat(1000));
        assert!(message.len() < 200 && message.ends_with("(2000 bytes)"), "{message}");
    }
}
