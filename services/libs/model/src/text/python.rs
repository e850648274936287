//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which chat templates were made with.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// The text of `value`; with `indent`, one item a line.
pub(super) fn json(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let mut out = String::new();
    write(value, indent, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => out.push_str(&string(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| (None, item));
            return container(['[', ']'], items.collect(), indent, depth, out);
        }
        ValueKind::Map => {
            let pair = |key: Value| value.get_item(&key).map(|item| (Some(key.to_string()), item));
            let items = value.try_iter()?.map(pair).collect::<Result<_, _>>()?;
            return container(['{', '}'], items, indent, depth, out);
        }
        other => {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {other} has no JSON")));
        }
    }
    Ok(())
}

fn container(
    [open, close]: [char; 2],
    items: Vec<(Option<String>, Value)>,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    let empty = items.is_empty();
    out.push(open);
    for (index, (key, item)) in items.into_iter().enumerate() {
        if index > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        break_line(indent, depth + 1, out);
        if let Some(key) = key {
            out.push_str(&string(&key));
            out.push_str(": ");
        }
        write(&item, indent, depth + 1, out)?;
    }
    if !empty {
        break_line(indent, depth, out);
    }
    out.push(close);
    Ok(())
}

fn break_line(indent: Option<usize>, depth: usize, out: &mut String) {
    if let Some(width) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
}

fn string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Value {
        Value::from_pairs([
            ("a", Value::from(vec![Value::from(1), Value::from(2.5), Value::from(true), Value::from(())])),
            ("b", Value::from("<é \"x\"\n>")),
            ("c", Value::from(Vec::<i32>::new())),
        ])
    }

    #[test]
    fn compact_as_python_writes_it() {
        assert_eq!(json(&sample(), None).unwrap(), r#"{"a": [1, 2.5, true, null], "b": "<é \"x\"\n>", "c": []}"#);
    }

    #[test]
    fn indented_as_python_writes_it() {
        let value = Value::from_pairs([("a", Value::from(vec![1, 2])), ("b", Value::from(Vec::<i32>::new()))]);
        assert_eq!(json(&value, Some(2)).unwrap(), "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}");
    }
}
