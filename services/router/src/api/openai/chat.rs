//! `POST /v1/chat/completions`.

use conclave_proto::v1::{Chat, GenerateRequest, Message, Prompt, Resume, prompt};
use conclave_serve::Error;
use serde_json::Value;

use super::{
    fields::{Fields, elements, wrong},
    request::{self, MAX_CHOICES, Shape},
};

/// As OpenAI has it.
const MAX_TOP_LOGPROBS: i64 = 20;
const NEUTRAL: &[(&str, &[&str])] = &[
    ("add_generation_prompt", &["true"]),
    ("audio", &[]),
    ("best_of", &["1"]),
    ("continue_final_message", &["false"]),
    ("echo", &["false"]),
    ("function_call", &[r#""none""#]),
    ("functions", &["[]"]),
    ("modalities", &[r#"["text"]"#]),
    ("parallel_tool_calls", &["true", "false"]),
    ("tool_choice", &[r#""none""#]),
    ("tools", &["[]"]),
];

/// Reads a request and the shape of its answer.
pub(super) fn parse(mut fields: Fields) -> Result<(GenerateRequest, Shape), Error> {
    let (mut request, shape) = request::common(&mut fields)?;
    let messages = messages(&mut fields)?;
    request.prompt = Some(Prompt { prompt: Some(prompt::Prompt::Chat(Chat { messages })) });
    request.logprobs = logprobs(&mut fields)?;
    request.resume = resume(&mut fields)?;
    request::finish(fields, NEUTRAL)?;
    Ok((request, shape))
}

/// `logprobs` turns them on, `top_logprobs` says how many of the likeliest stand beside each.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Error> {
    let on = fields.boolean("logprobs")?.unwrap_or(false);
    match fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.and_then(|top| u32::try_from(top).ok()) {
        Some(top) if !on && top > 0 => {
            let message = format!("top_logprobs: found {top}, expected none: logprobs is not true");
            Err(Error::invalid(message).with_param("top_logprobs"))
        }
        top => Ok(on.then_some(top.unwrap_or(0))),
    }
}

/// What was received, with `return_token_ids`, of an answer whose stream broke: `index` and `token_ids` of each choice to
/// go on with.
fn resume(fields: &mut Fields) -> Result<Vec<Resume>, Error> {
    const NAME: &str = "resume";
    let values = fields.array(NAME)?.unwrap_or_default();
    values.into_iter().enumerate().map(|(i, value)| resumed_choice(&format!("{NAME}[{i}]"), value)).collect()
}

fn resumed_choice(name: &str, value: Value) -> Result<Resume, Error> {
    let mut fields = Fields::of(name, value)?;
    let index = fields.integer("index", 0..=MAX_CHOICES - 1)?.and_then(|index| u32::try_from(index).ok());
    let tokens = fields.ids("token_ids")?;
    fields.finish(&[])?;
    Ok(Resume { choice: index.unwrap_or(0), tokens })
}

fn messages(fields: &mut Fields) -> Result<Vec<Message>, Error> {
    const NAME: &str = "messages";
    let values = fields.array(NAME)?.ok_or_else(|| wrong(NAME, &Value::Null, "an array of messages"))?;
    values.into_iter().enumerate().map(|(i, value)| message(&format!("{NAME}[{i}]"), value)).collect()
}

fn message(name: &str, value: Value) -> Result<Message, Error> {
    let mut fields = Fields::of(name, value)?;
    let role = fields.string("role")?.ok_or_else(|| wrong(&fields.path("role"), &Value::Null, "a role"))?;
    let at = fields.path("content");
    let content = content(&at, fields.take("content").unwrap_or_default())?;
    fields.finish(&[("tool_calls", &["[]"]), ("function_call", &[]), ("refusal", &[]), ("audio", &[])])?;
    // `developer` is what newer clients of OpenAI call the system's messages.
    let role = if role == "developer" { "system".to_owned() } else { role };
    Ok(Message { role, content })
}

/// A string, or text parts, which are put together.
fn content(name: &str, value: Value) -> Result<String, Error> {
    match value {
        Value::String(text) => Ok(text),
        Value::Array(_) => {
            let parts = elements(name, value)?.into_iter().enumerate();
            parts.map(|(i, part)| text_part(&format!("{name}[{i}]"), part)).collect()
        }
        other => Err(wrong(name, &other, "a string or an array of text parts")),
    }
}

fn text_part(name: &str, value: Value) -> Result<String, Error> {
    let mut part = Fields::of(name, value)?;
    let kind = part.string("type")?.unwrap_or_default();
    if kind != "text" {
        return Err(wrong(&part.path("type"), &Value::String(kind), "\"text\""));
    }
    let text = part.string("text")?.ok_or_else(|| wrong(&part.path("text"), &Value::Null, "a string"))?;
    part.finish(&[])?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<(GenerateRequest, Shape), Error> {
        parse(Fields::parse(json.as_bytes()).expect("an object"))
    }

    /// A valid request with more fields.
    fn with(more: &str) -> Result<(GenerateRequest, Shape), Error> {
        read(&format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],{more}}}"#))
    }

    fn refused(result: Result<(GenerateRequest, Shape), Error>) -> (String, String) {
        let error = result.expect_err("refused");
        (error.message, error.param.unwrap_or_default())
    }

    #[test]
    fn contents_may_come_in_parts() {
        let json = r#"{"messages":[{"role":"developer","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
            {"role":"assistant","content":"c","tool_calls":[],"refusal":null}]}"#;
        let (request, _) = read(json).expect("valid");
        let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
        let messages = vec![message("system", "ab"), message("assistant", "c")];
        assert_eq!(request.prompt, Some(Prompt { prompt: Some(prompt::Prompt::Chat(Chat { messages })) }));
    }

    #[test]
    fn wrong_messages_are_located() {
        let (message, _) = refused(read("{}"));
        assert_eq!(message, "messages: found null, expected an array of messages");
        let (message, _) = refused(read(r#"{"messages":["hi"]}"#));
        assert_eq!(message, "messages[0]: found the string \"hi\", expected an object");
        let (message, param) = refused(read(r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#));
        assert_eq!(message, "messages[0].content[0].type: found the string \"image_url\", expected \"text\"");
        assert_eq!(param, "messages[0].content[0].type");
        let (message, _) = refused(read(r#"{"messages":[{"role":"user","content":"a","name":"bob"}]}"#));
        assert_eq!(message, "messages[0].name: this field is not supported here");
        let (message, _) = refused(read(r#"{"messages":[{"role":"user","content":null}]}"#));
        assert_eq!(message, "messages[0].content: found null, expected a string or an array of text parts");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (field, param) in [
            (r#""tools":[{"type":"function"}]"#, "tools"),
            (r#""tool_choice":"auto""#, "tool_choice"),
            (r#""response_format":{"type":"json_object"}"#, "response_format"),
            (r#""functions":[{}]"#, "functions"),
            (r#""audio":{}"#, "audio"),
            (r#""best_of":2"#, "best_of"),
            (r#""suffix":"x""#, "suffix"),
            (r#""modalities":["audio"]"#, "modalities"),
            (r#""reasoning_effort":"low""#, "reasoning_effort"),
            (r#""top_logprobs":2"#, "top_logprobs"),
        ] {
            assert_eq!(refused(with(field)).1, param, "{field}");
        }
        let neutral =
            r#""tools":[],"tool_choice":"none","response_format":{"type":"text"},"audio":null,"n":1,"store":false"#;
        assert!(with(neutral).is_ok());
    }

    #[test]
    fn a_broken_answer_is_resumed_by_choice() {
        let (request, _) = with(r#""n":2,"seed":1,"resume":[{"index":1,"token_ids":[5,6]},{}]"#).expect("valid");
        let of = |choice, tokens: &[u32]| Resume { choice, tokens: tokens.to_vec() };
        assert_eq!(request.resume, [of(1, &[5, 6]), of(0, &[])]);
        let (message, param) = refused(with(r#""resume":[{"index":0,"text":"a"}]"#));
        assert_eq!((&*message, &*param), ("resume[0].text: this field is not supported here", "resume[0].text"));
        assert_eq!(refused(with(r#""resume":[{"index":128}]"#)).1, "resume[0].index");
    }

    #[test]
    fn logprobs_are_asked_for_by_two_fields() {
        let asked = |more: &str| with(more).expect("valid").0.logprobs;
        assert_eq!(asked(r#""logprobs":true,"top_logprobs":5"#), Some(5));
        assert_eq!(asked(r#""logprobs":true"#), Some(0));
        assert_eq!(asked(r#""logprobs":false,"top_logprobs":0"#), None);
    }
}
