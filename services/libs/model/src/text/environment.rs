//! The Jinja environment that chat templates are written for.

use std::error::Error as _;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat;

use super::{TextError, clock, python};

/// What a template says by `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// An environment with the blocks trimmed, Python's methods, and the functions that templates may call.
pub(super) fn new() -> Result<Environment<'static>, TextError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| failure(&error))?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    Ok(environment)
}

fn raise(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// UTC: a cluster has no local time.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    clock::strftime(format, now).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
}

fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ascii == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii=true is not supported"));
    }
    python::json(value, indent.map(|width| width.min(16)))
}

/// Tells a template's own refusal from its failure.
pub(super) fn failure(error: &Error) -> TextError {
    let mut cause = error.source();
    while let Some(source) = cause {
        if let Some(Raised(reason)) = source.downcast_ref() {
            return TextError::Refused { reason: reason.clone() };
        }
        cause = source.source();
    }
    TextError::Template { reason: error.to_string() }
}
