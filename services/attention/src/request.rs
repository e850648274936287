//! A [`SequenceRequest`], checked field by field.

use std::time::Duration;

use conclave_proto::v1::{Sampling, SequenceRequest};
use conclave_serve::Error;

use crate::sampler::Params;

/// Most stop token ids of a request.
const MAX_STOP_TOKENS: usize = 256;

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Ids are below it.
    pub(crate) vocab: usize,
    /// Longest sequence.
    pub(crate) context_limit: usize,
    /// Most likely tokens beside a token.
    pub(crate) max_logprobs: usize,
}

/// A checked request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) id: String,
    /// Prompt, then what was generated so far.
    pub(crate) tokens: Vec<u32>,
    /// At least 1.
    pub(crate) prompt_len: usize,
    pub(crate) choice: u32,
    pub(crate) params: Params,
    /// Tokens that the sequence may grow to.
    pub(crate) max_len: usize,
    /// Ascending.
    pub(crate) stop: Vec<u32>,
    pub(crate) logprobs: Option<usize>,
    /// `None` also where the prompt's scores were given before: when a sequence is resumed.
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) budget: Option<Duration>,
    pub(crate) traceparent: String,
    /// Only sequences with the same salt share cached prefixes.
    pub(crate) cache_salt: Vec<u8>,
}

impl Request {
    /// Whether nothing is to be generated.
    pub(crate) fn score_only(&self) -> bool {
        self.max_len == self.prompt_len
    }
}

/// Checks a request.
///
/// # Errors
/// Invalid argument, naming the field, what was found and what was expected.
pub(crate) fn check(request: SequenceRequest, bounds: &Bounds) -> Result<Request, Error> {
    let prompt_len = check_tokens(&request, bounds)?;
    let sampling = request.sampling.as_ref().ok_or_else(|| field("sampling", "nothing", "settings"))?;
    let params = check_sampling(sampling, &request, bounds)?;
    let max_len = check_length(&request, prompt_len, bounds)?;
    let resumed = request.tokens.len() > prompt_len;
    Ok(Request {
        prompt_len,
        params,
        max_len,
        stop: check_stop(&request, bounds)?,
        logprobs: check_logprobs("logprobs", request.logprobs, bounds)?,
        prompt_logprobs: check_logprobs("prompt_logprobs", request.prompt_logprobs, bounds)?.filter(|_| !resumed),
        budget: (request.budget_ms > 0).then(|| Duration::from_millis(request.budget_ms)),
        id: request.request_id,
        tokens: request.tokens,
        choice: request.choice,
        traceparent: request.traceparent,
        cache_salt: request.cache_salt.into(),
    })
}

fn field(name: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::invalid(format!("{name}: found {found}, expected {expected}")).with_param(name)
}

fn check_ids(name: &str, ids: &[u32], bounds: &Bounds) -> Result<(), Error> {
    match ids.iter().position(|id| *id as usize >= bounds.vocab) {
        None => Ok(()),
        Some(at) => {
            Err(field(name, format_args!("id {} at {at}", ids[at]), format_args!("ids below {}", bounds.vocab)))
        }
    }
}

fn check_tokens(request: &SequenceRequest, bounds: &Bounds) -> Result<usize, Error> {
    let (tokens, prompt_len) = (request.tokens.len(), request.prompt_len as usize);
    if tokens == 0 {
        return Err(field("tokens", "none", "at least one"));
    }
    if prompt_len == 0 || prompt_len > tokens {
        return Err(field("prompt_len", prompt_len, format_args!("1 to the {tokens} tokens given")));
    }
    if tokens > bounds.context_limit {
        let expected = format_args!("at most the context limit of {}", bounds.context_limit).to_string();
        return Err(field("tokens", format_args!("{tokens} tokens"), expected));
    }
    check_ids("tokens", &request.tokens, bounds)?;
    Ok(prompt_len)
}

fn check_sampling(sampling: &Sampling, request: &SequenceRequest, bounds: &Bounds) -> Result<Params, Error> {
    let params = Params::new(sampling, bounds.vocab)?;
    if sampling.min_tokens > request.max_tokens {
        let expected = format!("at most max_tokens, {}", request.max_tokens);
        return Err(field("min_tokens", sampling.min_tokens, expected));
    }
    Ok(params)
}

/// Tokens that the sequence may have in the end.
fn check_length(request: &SequenceRequest, prompt_len: usize, bounds: &Bounds) -> Result<usize, Error> {
    if request.max_tokens == 0 {
        return match request.prompt_logprobs {
            Some(_) if request.tokens.len() == prompt_len => Ok(prompt_len),
            Some(_) => Err(field("max_tokens", "0 with generated tokens", "at least 1")),
            None => Err(field("max_tokens", 0, "at least 1, or prompt_logprobs")),
        };
    }
    if prompt_len == bounds.context_limit {
        let expected = format!("fewer than the context limit of {}, or max_tokens 0", bounds.context_limit);
        return Err(field("tokens", format_args!("a prompt of {prompt_len} tokens"), expected));
    }
    Ok(prompt_len.saturating_add(request.max_tokens as usize).min(bounds.context_limit))
}

fn check_stop(request: &SequenceRequest, bounds: &Bounds) -> Result<Vec<u32>, Error> {
    let found = request.stop_token_ids.len();
    if found > MAX_STOP_TOKENS {
        return Err(field("stop_token_ids", found, format_args!("at most {MAX_STOP_TOKENS}")));
    }
    check_ids("stop_token_ids", &request.stop_token_ids, bounds)?;
    let mut stop = request.stop_token_ids.clone();
    stop.sort_unstable();
    stop.dedup();
    Ok(stop)
}

fn check_logprobs(name: &str, asked: Option<u32>, bounds: &Bounds) -> Result<Option<usize>, Error> {
    match asked {
        Some(count) if count as usize > bounds.max_logprobs => {
            Err(field(name, count, format_args!("at most {}", bounds.max_logprobs)))
        }
        asked => Ok(asked.map(|count| count as usize)),
    }
}

#[cfg(test)]
mod tests {
    use conclave_serve::ErrorKind;

    use super::*;

    const BOUNDS: Bounds = Bounds { vocab: 100, context_limit: 32, max_logprobs: 20 };

    fn request() -> SequenceRequest {
        let sampling = Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() };
        SequenceRequest {
            tokens: vec![1, 2, 3],
            prompt_len: 2,
            sampling: Some(sampling),
            max_tokens: 10,
            stop_token_ids: vec![9, 4, 9],
            logprobs: Some(0),
            ..SequenceRequest::default()
        }
    }

    fn refused(change: impl FnOnce(&mut SequenceRequest)) -> String {
        let mut request = request();
        change(&mut request);
        let error = check(request, &BOUNDS).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.param.is_some(), "{error}");
        error.message
    }

    #[test]
    fn limits_count_from_the_prompt_and_stop_at_the_context() {
        let checked = check(request(), &BOUNDS).unwrap();
        assert_eq!((checked.max_len, checked.stop, checked.logprobs), (12, vec![4, 9], Some(0)));
        let checked = check(SequenceRequest { max_tokens: u32::MAX, ..request() }, &BOUNDS).unwrap();
        assert_eq!((checked.max_len, checked.budget), (32, None));
    }

    #[test]
    fn scores_of_the_prompt_are_not_given_twice() {
        let scored = SequenceRequest { prompt_logprobs: Some(1), ..request() };
        assert_eq!(check(scored.clone(), &BOUNDS).unwrap().prompt_logprobs, None);
        let fresh = SequenceRequest { tokens: vec![1, 2], ..scored };
        assert_eq!(check(fresh.clone(), &BOUNDS).unwrap().prompt_logprobs, Some(1));
        let only = check(SequenceRequest { max_tokens: 0, ..fresh }, &BOUNDS).unwrap();
        assert!(only.score_only());
    }

    #[test]
    fn every_field_is_checked() {
        assert_eq!(refused(|r| r.tokens.clear()), "tokens: found none, expected at least one");
        assert_eq!(refused(|r| r.prompt_len = 0), "prompt_len: found 0, expected 1 to the 3 tokens given");
        assert_eq!(refused(|r| r.prompt_len = 4), "prompt_len: found 4, expected 1 to the 3 tokens given");
        assert_eq!(refused(|r| r.tokens[1] = 100), "tokens: found id 100 at 1, expected ids below 100");
        let long = refused(|r| r.tokens = vec![0; 33]);
        assert_eq!(long, "tokens: found 33 tokens, expected at most the context limit of 32");
        let full = refused(|r| (r.tokens, r.prompt_len) = (vec![0; 32], 32));
        assert!(full.contains("a prompt of 32 tokens") && full.contains("context limit of 32"), "{full}");
        assert_eq!(refused(|r| r.max_tokens = 0), "max_tokens: found 0, expected at least 1, or prompt_logprobs");
        assert_eq!(refused(|r| r.sampling = None), "sampling: found nothing, expected settings");
        assert!(refused(|r| r.stop_token_ids = vec![100]).starts_with("stop_token_ids: found id 100"));
        assert!(refused(|r| r.stop_token_ids = vec![1; 257]).starts_with("stop_token_ids: found 257"));
        assert_eq!(refused(|r| r.logprobs = Some(21)), "logprobs: found 21, expected at most 20");
        assert_eq!(refused(|r| r.prompt_logprobs = Some(21)), "prompt_logprobs: found 21, expected at most 20");
        let min_tokens = refused(|r| r.sampling.as_mut().unwrap().min_tokens = 11);
        assert_eq!(min_tokens, "min_tokens: found 11, expected at most max_tokens, 10");
    }
}
