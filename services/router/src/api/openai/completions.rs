//! `POST /v1/completions`.

use conclave_proto::v1::{GenerateRequest, Prompt, TokenIds, prompt};
use conclave_serve::Error;
use serde_json::Value;

use super::{
    fields::{Fields, wrong},
    request::{self, Shape, strings, token_ids, unsupported},
};

/// Tokens generated where the request does not say how many, as OpenAI has it.
const DEFAULT_MAX_TOKENS: u32 = 16;
const NEUTRAL: &[(&str, &[&str])] = &[("suffix", &[r#""""#])];

/// Reads a request: one [`GenerateRequest`] per prompt, and the shape of the answer.
pub(super) fn parse(mut fields: Fields) -> Result<(Vec<GenerateRequest>, Shape), Error> {
    let (mut request, mut shape) = request::common(&mut fields)?;
    let prompts = prompts(&mut fields)?;
    shape.echo = fields.boolean("echo")?.unwrap_or(false);
    request.logprobs = fields.count("logprobs", 0)?;
    request.max_tokens.get_or_insert(DEFAULT_MAX_TOKENS);
    if shape.echo && (request.logprobs.is_some() || request.max_tokens == Some(0)) {
        request.prompt_logprobs = Some(request.logprobs.unwrap_or(0));
    }
    if let Some(best_of) = fields.take("best_of")
        && best_of.as_u64() != Some(u64::from(request.choices))
    {
        return Err(unsupported("best_of", &best_of));
    }
    request::finish(fields, NEUTRAL)?;
    let with = |prompt| GenerateRequest { prompt: Some(Prompt { prompt: Some(prompt) }), ..request.clone() };
    Ok((prompts.into_iter().map(with).collect(), shape))
}

/// One text, several, one list of token ids, or several.
fn prompts(fields: &mut Fields) -> Result<Vec<prompt::Prompt>, Error> {
    const NAME: &str = "prompt";
    const EXPECTED: &str = "a string, an array of strings, of token ids, or of arrays of token ids";
    let tokens = |ids| prompt::Prompt::Tokens(TokenIds { ids });
    match fields.take(NAME).unwrap_or_default() {
        Value::String(text) => Ok(vec![prompt::Prompt::Text(text)]),
        Value::Array(values) => match values.first() {
            Some(Value::String(_)) => Ok(strings(NAME, values)?.into_iter().map(prompt::Prompt::Text).collect()),
            Some(Value::Number(_)) => Ok(vec![tokens(token_ids(NAME, Value::Array(values))?)]),
            Some(Value::Array(_)) => {
                let lists = values.into_iter().enumerate();
                lists.map(|(i, list)| token_ids(&format!("{NAME}[{i}]"), list).map(tokens)).collect()
            }
            _ => Err(wrong(NAME, &Value::Array(values), EXPECTED)),
        },
        other => Err(wrong(NAME, &other, EXPECTED)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<(Vec<GenerateRequest>, Shape), Error> {
        parse(Fields::parse(json.as_bytes()).expect("an object"))
    }

    fn refusal(json: &str) -> String {
        read(json).expect_err("refused").message
    }

    #[test]
    fn every_form_of_prompt_is_read() {
        let count = |json: &str| read(json).map(|(requests, _)| requests.len());
        assert_eq!(count(r#"{"prompt":"a"}"#), Ok(1));
        assert_eq!(count(r#"{"prompt":["a","b"]}"#), Ok(2));
        assert_eq!(count(r#"{"prompt":[1,2,3]}"#), Ok(1));
        assert_eq!(count(r#"{"prompt":[[1],[2,3]]}"#), Ok(2));
        let expected = "a string, an array of strings, of token ids, or of arrays of token ids";
        assert_eq!(refusal("{}"), format!("prompt: found null, expected {expected}"));
        assert_eq!(refusal(r#"{"prompt":[]}"#), format!("prompt: found an array of 0, expected {expected}"));
        assert_eq!(refusal(r#"{"prompt":{}}"#), format!("prompt: found an object, expected {expected}"));
        assert_eq!(refusal(r#"{"prompt":[1,"a"]}"#), "prompt[1]: found the string \"a\", expected a token id");
        assert_eq!(refusal(r#"{"prompt":[[1],[-2]]}"#), "prompt[1][0]: found -2, expected a token id");
    }

    #[test]
    fn scoring_asks_for_the_prompts_logprobs() {
        let (requests, shape) = read(r#"{"prompt":"a","max_tokens":0,"echo":true,"logprobs":2}"#).expect("valid");
        assert_eq!((requests[0].max_tokens, requests[0].prompt_logprobs, shape.echo), (Some(0), Some(2), true));
        let (requests, _) = read(r#"{"prompt":"a"}"#).expect("valid");
        assert_eq!((requests[0].max_tokens, requests[0].prompt_logprobs), (Some(16), None));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert_eq!(refusal(r#"{"prompt":"a","suffix":"b"}"#), "suffix: the string \"b\" is not supported here");
        assert_eq!(refusal(r#"{"prompt":"a","best_of":2}"#), "best_of: 2 is not supported here");
        assert_eq!(refusal(r#"{"prompt":"a","tools":[]}"#), "tools: this field is not supported here");
        assert!(read(r#"{"prompt":"a","suffix":"","best_of":3,"n":3,"user":"me"}"#).is_ok());
        assert_eq!(
            refusal(r#"{"prompt":"a","stream_options":{"include_usage":true}}"#),
            "stream_options: found an object, expected none: stream is not true"
        );
        assert_eq!(
            refusal(r#"{"prompt":"a","stream":true,"stream_options":{"x":1}}"#),
            "stream_options.x: this field is not supported here"
        );
    }

    #[test]
    fn sampling_fields_arrive() {
        let json = r#"{"prompt":"a","seed":-1,"top_k":-1,"temperature":0.5,"min_p":0.1,"logit_bias":{"7":-100},
            "stop":"x","stop_token_ids":[3],"min_tokens":2,"ignore_eos":true,"max_completion_tokens":9}"#;
        let (requests, _) = read(json).expect("valid");
        let sampling = requests[0].sampling.clone().expect("there");
        assert_eq!((sampling.seed, sampling.top_k, sampling.temperature), (Some(u64::MAX), Some(0), Some(0.5)));
        assert_eq!((sampling.min_p, sampling.min_tokens), (Some(0.1), Some(2)));
        assert_eq!(sampling.logit_bias, HashMap::from([(7, -100.0)]));
        assert_eq!((requests[0].max_tokens, requests[0].ignore_eos), (Some(9), true));
        assert_eq!((&requests[0].stop[..], &requests[0].stop_token_ids[..]), (&["x".to_owned()][..], &[3][..]));
    }

    use std::collections::HashMap;
}
