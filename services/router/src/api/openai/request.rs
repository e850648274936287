//! The fields that chat and text completions share.

use std::collections::HashMap;

use conclave_proto::v1::{GenerateRequest, SamplingOptions};
use conclave_serve::Error;
use serde_json::Value;

use super::fields::{Fields, elements, shown, token_id, wrong};

/// What is asked for besides the generation itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Shape {
    /// Server-sent events instead of one body.
    pub(super) stream: bool,
    /// A last event with the usage.
    pub(super) include_usage: bool,
    /// Tokens in logprobs as `token_id:N`.
    pub(super) tokens_as_ids: bool,
    /// Token ids of prompt and output in every choice.
    pub(super) return_ids: bool,
    /// The prompt in front of the output.
    pub(super) echo: bool,
}

/// Most choices of a prompt, as OpenAI has it.
pub(super) const MAX_CHOICES: i64 = 128;
/// Metadata that changes nothing in the answer.
const METADATA: [&str; 4] = ["user", "metadata", "safety_identifier", "prompt_cache_key"];

/// Fields that are accepted where they say what holds anyway.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("add_special_tokens", &["true"]),
    ("early_stopping", &["false"]),
    ("length_penalty", &["1", "1.0"]),
    ("priority", &["0"]),
    ("service_tier", &[r#""auto""#, r#""default""#]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("store", &["false"]),
    ("use_beam_search", &["false"]),
    ("response_format", &[r#"{"type":"text"}"#]),
];

/// Reads the shared fields into a request that still lacks its prompt and logprobs.
pub(super) fn common(fields: &mut Fields) -> Result<(GenerateRequest, Shape), Error> {
    for name in METADATA {
        fields.take(name);
    }
    let request = GenerateRequest {
        model: fields.string("model")?.unwrap_or_default(),
        sampling: Some(sampling(fields)?),
        max_tokens: max_tokens(fields)?,
        choices: choices(fields)?,
        stop: stops(fields)?,
        stop_token_ids: fields.ids("stop_token_ids")?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        ..GenerateRequest::default()
    };
    Ok((request, shape(fields)?))
}

/// Ends the reading: `neutral` are the endpoint's own fields that may say what holds anyway.
pub(super) fn finish(fields: Fields, neutral: &[(&str, &[&str])]) -> Result<(), Error> {
    fields.finish(&[NEUTRAL, neutral].concat())
}

fn choices(fields: &mut Fields) -> Result<u32, Error> {
    Ok(fields.integer("n", 1..=MAX_CHOICES)?.and_then(|n| u32::try_from(n).ok()).unwrap_or(1))
}

fn shape(fields: &mut Fields) -> Result<Shape, Error> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    Ok(Shape {
        stream,
        include_usage: include_usage(fields, stream)?,
        tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
        return_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
        echo: false,
    })
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, Error> {
    const NAME: &str = "stream_options";
    let Some(value) = fields.take(NAME) else { return Ok(false) };
    if !stream {
        return Err(wrong(NAME, &value, "none: stream is not true"));
    }
    let mut options = Fields::of(NAME, value)?;
    let include = options.boolean("include_usage")?.unwrap_or(false);
    options.finish(&[("include_obfuscation", &["false"])])?;
    Ok(include)
}

fn sampling(fields: &mut Fields) -> Result<SamplingOptions, Error> {
    Ok(SamplingOptions {
        // A negative seed is one of 2^64, too.
        seed: seed(fields)?,
        temperature: fields.number("temperature")?,
        // -1 is all, as for vLLM.
        top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| u32::try_from(k).unwrap_or(0)),
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias: logit_bias(fields)?,
        min_tokens: fields.count("min_tokens", 0)?,
    })
}

fn seed(fields: &mut Fields) -> Result<Option<u64>, Error> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| wrong("seed", &value, "a 64-bit integer"))
}

fn logit_bias(fields: &mut Fields) -> Result<HashMap<u32, f32>, Error> {
    const NAME: &str = "logit_bias";
    let Some(value) = fields.take(NAME) else { return Ok(HashMap::new()) };
    let Value::Object(map) = value else { return Err(wrong(NAME, &value, "an object of token ids and biases")) };
    let entry = |(id, bias): (String, Value)| {
        let token = id.parse().map_err(|_| wrong(NAME, &Value::String(id.clone()), "a token id as key"))?;
        let bias = bias.as_f64().ok_or_else(|| wrong(&format!("{NAME}.{id}"), &bias, "a number"))?;
        Ok((token, bias as f32))
    };
    map.into_iter().map(entry).collect()
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, Error> {
    let (old, new) = (fields.count("max_tokens", 0)?, fields.count("max_completion_tokens", 0)?);
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            let message = format!("max_tokens is {old} and max_completion_tokens is {new}, expected one of them");
            Err(Error::invalid(message).with_param("max_completion_tokens"))
        }
        (old, new) => Ok(new.or(old)),
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, Error> {
    const NAME: &str = "stop";
    match fields.take(NAME) {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(Value::Array(stops)) => strings(NAME, stops),
        Some(other) => Err(wrong(NAME, &other, "a string or an array of strings")),
    }
}

/// All of an array as strings.
pub(super) fn strings(name: &str, values: Vec<Value>) -> Result<Vec<String>, Error> {
    let string = |(i, value)| match value {
        Value::String(text) => Ok(text),
        other => Err(wrong(&format!("{name}[{i}]"), &other, "a string")),
    };
    values.into_iter().enumerate().map(string).collect()
}

/// All of an array as token ids.
pub(super) fn token_ids(name: &str, value: Value) -> Result<Vec<u32>, Error> {
    let ids = elements(name, value)?;
    ids.iter().enumerate().map(|(i, id)| token_id(&format!("{name}[{i}]"), id)).collect()
}

/// A field that has another value than its neutral one.
pub(super) fn unsupported(name: &str, value: &Value) -> Error {
    Error::invalid(format!("{name}: {} is not supported here", shown(value))).with_param(name)
}
