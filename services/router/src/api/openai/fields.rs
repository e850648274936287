//! A request's JSON object, read field by field, so that every error names the field and none is overlooked.

use std::ops::RangeInclusive;

use conclave_serve::Error;
use serde_json::{Map, Value};

use super::error::ApiError;

/// Longest part of a wrong value that a message shows, in characters.
const SHOWN: usize = 40;

/// The fields of a JSON object that have not been read yet.
pub(super) struct Fields {
    map: Map<String, Value>,
    /// What stands before a field's name in messages.
    path: String,
}

impl Fields {
    /// Reads a body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value = serde_json::from_slice(body).map_err(|error| {
            ApiError::invalid(format!("the body is not valid JSON: {error}")).with_code("invalid_json")
        })?;
        match value {
            Value::Object(map) => Ok(Self { map, path: String::new() }),
            other => Err(ApiError::invalid(format!("body: found {}, expected a JSON object", shown(&other)))),
        }
    }

    /// The fields of an object that stands in field `name`.
    pub(super) fn of(name: &str, value: Value) -> Result<Self, Error> {
        match value {
            Value::Object(map) => Ok(Self { map, path: format!("{name}.") }),
            other => Err(wrong(name, &other, "an object")),
        }
    }

    /// The field's name in messages.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The field's value; `None` where it is missing or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        self.read(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Error> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Error> {
        self.read(name, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    pub(super) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, Error> {
        self.take(name).map(|value| elements(&self.path(name), value)).transpose()
    }

    /// An integer within `range`.
    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Error> {
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        self.read(name, &expected, |value| value.as_i64().filter(|number| range.contains(number)))
    }

    /// A 32-bit count of at least `least`.
    pub(super) fn count(&mut self, name: &str, least: u32) -> Result<Option<u32>, Error> {
        let range = i64::from(least)..=i64::from(u32::MAX);
        Ok(self.integer(name, range)?.and_then(|number| u32::try_from(number).ok()))
    }

    /// Token ids.
    pub(super) fn ids(&mut self, name: &str) -> Result<Vec<u32>, Error> {
        let ids = self.array(name)?.unwrap_or_default();
        let path = self.path(name);
        ids.iter().enumerate().map(|(i, id)| token_id(&format!("{path}[{i}]"), id)).collect()
    }

    /// Reads no more: what is left must be null or say what holds anyway (`neutral`: field and its values).
    pub(super) fn finish(self, neutral: &[(&str, &[&str])]) -> Result<(), Error> {
        let holds = |name: &str, value: &Value| {
            let values = neutral.iter().find(|(known, _)| *known == name).map_or(&[][..], |(_, values)| values);
            value.is_null() || values.contains(&value.to_string().as_str())
        };
        let Some((name, value)) = self.map.iter().find(|(name, value)| !holds(name, value)) else {
            return Ok(());
        };
        let name = format!("{}{}", self.path, cut(name));
        let known = neutral.iter().any(|(known, _)| format!("{}{known}", self.path) == name);
        let what = if known { format!("{} is", shown(value)) } else { "this field is".to_owned() };
        Err(Error::invalid(format!("{name}: {what} not supported here")).with_param(name))
    }

    fn read<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(&self.path(name), &value, expected))
    }
}

/// The elements of an array in field `name`.
pub(super) fn elements(name: &str, value: Value) -> Result<Vec<Value>, Error> {
    match value {
        Value::Array(values) => Ok(values),
        other => Err(wrong(name, &other, "an array")),
    }
}

/// A token id.
pub(super) fn token_id(name: &str, value: &Value) -> Result<u32, Error> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(name, value, "a token id"))
}

/// The error of a field with a wrong value.
pub(super) fn wrong(name: &str, found: &Value, expected: &str) -> Error {
    Error::invalid(format!("{name}: found {}, expected {expected}", shown(found))).with_param(name)
}

/// A value as a message shows it: its kind, and the value where it is short.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("the string {:?}", cut(text)),
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).expect("an object")
    }

    fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, String) {
        let error = result.expect_err("refused");
        (error.message, error.param.unwrap_or_default())
    }

    #[test]
    fn a_wrong_type_is_named() {
        let mut fields = fields(r#"{"temperature":"hot","max_tokens":1.5,"n":-1,"stream":1,"stop_token_ids":[1,"x"]}"#);
        let found = message(fields.number("temperature"));
        assert_eq!(found, ("temperature: found the string \"hot\", expected a number".into(), "temperature".into()));
        assert_eq!(
            message(fields.count("max_tokens", 0)).0,
            "max_tokens: found 1.5, expected an integer from 0 to 4294967295"
        );
        assert_eq!(message(fields.integer("n", 1..=128)).0, "n: found -1, expected an integer from 1 to 128");
        assert_eq!(message(fields.boolean("stream")).0, "stream: found 1, expected true or false");
        let found = message(fields.ids("stop_token_ids"));
        assert_eq!(found.0, "stop_token_ids[1]: found the string \"x\", expected a token id");
    }

    #[test]
    fn null_is_missing() {
        assert_eq!(fields(r#"{"seed":null}"#).integer("seed", 0..=9), Ok(None));
    }

    #[test]
    fn what_is_left_over_is_refused_by_name() {
        let neutral: &[(&str, &[&str])] = &[("tools", &["[]"])];
        assert_eq!(fields(r#"{"tools":[]}"#).finish(neutral), Ok(()));
        assert_eq!(fields(r#"{"tools":null,"what":null}"#).finish(neutral), Ok(()));
        let found = message(fields(r#"{"tools":[{}]}"#).finish(neutral));
        assert_eq!(found, ("tools: an array of 1 is not supported here".into(), "tools".into()));
        let found = message(fields(r#"{"what":0}"#).finish(neutral));
        assert_eq!(found, ("what: this field is not supported here".into(), "what".into()));
    }

    #[test]
    fn malformed_json_is_located() {
        let error = Fields::parse(b"{\"model\": }").err().expect("refused");
        let body = serde_json::to_string(&error.body()).expect("JSON");
        assert!(body.contains("the body is not valid JSON: expected value at line 1 column 11"), "{body}");
    }

    #[test]
    fn long_values_are_cut() {
        let value = Value::String("x".repeat(100));
        assert_eq!(shown(&value), format!("the string \"{}…\"", "x".repeat(40)));
    }
}
