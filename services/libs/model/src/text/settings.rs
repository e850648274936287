//! `tokenizer_config.json` and the place of the chat template.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::TextError;
use crate::json::{self, Fields, JsonError};
use crate::{ModelError, files};

/// What the tokenizer's configuration says.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) pad: Option<String>,
    pub(super) unk: Option<String>,
    pub(super) adds_bos: bool,
    /// Source of the chat template.
    pub(super) template: Option<String>,
    /// The file that the template is from.
    pub(super) path: PathBuf,
}

impl Settings {
    /// Reads the settings of a directory; without a file all are absent. A `chat_template.jinja` goes before the
    /// template in `tokenizer_config.json`.
    pub(super) fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("tokenizer_config.json");
        let mut settings = match files::read_optional(&path)? {
            None => Self::default(),
            Some(text) => {
                let document = json::object(&text).map_err(ModelError::json(&path))?;
                Self::parse(&document).map_err(ModelError::json(&path))?
            }
        };
        settings.path = path;
        let jinja = dir.join("chat_template.jinja");
        if let Some(source) = files::read_optional(&jinja)? {
            let source = String::from_utf8(source).map_err(|error| ModelError::Text {
                path: jinja.clone(),
                error: TextError::Template { reason: error.to_string() },
            })?;
            settings.template = Some(source);
            settings.path = jinja;
        }
        Ok(settings)
    }

    fn parse(document: &Map<String, Value>) -> Result<Self, JsonError> {
        let fields = Fields::root(document);
        Ok(Self {
            bos: token(&fields, "bos_token")?,
            eos: token(&fields, "eos_token")?,
            pad: token(&fields, "pad_token")?,
            unk: token(&fields, "unk_token")?,
            adds_bos: fields.flag("add_bos_token")?.unwrap_or(false),
            template: template(&fields)?,
            path: PathBuf::new(),
        })
    }
}

/// A string, or an object with the string as `content`.
fn token(fields: &Fields<'_>, key: &str) -> Result<Option<String>, JsonError> {
    match fields.value(key) {
        None => Ok(None),
        Some(Value::Object(map)) => {
            Fields::nested(&fields.path(key), map).required_text("content").map(|content| Some(content.into()))
        }
        Some(Value::String(content)) => Ok(Some(content.clone())),
        Some(other) => Err(fields.wrong(key, other, "a string or an object with content")),
    }
}

/// A string, or a list of named templates, of which the one named `default` is meant.
fn template(fields: &Fields<'_>) -> Result<Option<String>, JsonError> {
    let expected = "a string or a list of {name, template}";
    match fields.value("chat_template") {
        None => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                let Some(map) = item.as_object() else { return Err(fields.wrong("chat_template", item, expected)) };
                let named = Fields::nested(&fields.path(&format!("chat_template[{index}]")), map);
                if named.required_text("name")? == "default" {
                    return named.required_text("template").map(|source| Some(source.into()));
                }
            }
            Err(fields.missing("chat_template", "a template named \"default\""))
        }
        Some(other) => Err(fields.wrong("chat_template", other, expected)),
    }
}
