//! From a request to everything that decides its tokens: request, then the checkpoint's defaults, then neutral.

use std::{collections::HashMap, ops::RangeInclusive, time::Duration};

use conclave_proto::v1::{GenerateRequest, Resume, Sampling, SamplingOptions};
use conclave_serve::Error;

use super::{FrontConfig, FrontError, ServedModel, resume};

/// Longest stop string in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Most stop token ids of a request.
const MAX_STOP_TOKENS: usize = 128;
/// Most entries of a logit bias.
const MAX_LOGIT_BIAS: usize = 1024;

/// A request's settings, checked and resolved; the prompt is not among them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    /// The choices to run, each with what was generated of it before.
    pub(crate) choices: Vec<Resume>,
    pub(crate) sampling: Sampling,
    /// `None`: up to the context limit.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) timeout: Duration,
}

/// Checks and resolves everything but the prompt. `seed` is taken where the request gives none.
pub(crate) fn settings(
    request: &GenerateRequest,
    model: &ServedModel,
    config: &FrontConfig,
    seed: u64,
) -> Result<Settings, FrontError> {
    check_model(&request.model, model)?;
    let options = request.sampling.clone().unwrap_or_default();
    let vocab = model.config.vocab;
    check_stops(&request.stop, model, config)?;
    Ok(Settings {
        choices: resume::choices(request, vocab, config.max_choices)?,
        max_tokens: max_tokens(request, options.min_tokens.unwrap_or(0))?,
        sampling: sampling(options, model, seed)?,
        stop: request.stop.clone(),
        include_stop: request.include_stop,
        stop_token_ids: stop_tokens(request, model, vocab)?,
        logprobs: logprobs("logprobs", request.logprobs, config)?,
        prompt_logprobs: logprobs("prompt_logprobs", request.prompt_logprobs, config)?,
        timeout: timeout(request.timeout_ms, config)?,
    })
}

/// Tokens to generate at most, where prompt and output fit into the context.
pub(crate) fn fit(limit: u32, prompt: usize, max_tokens: Option<u32>) -> Result<u32, FrontError> {
    let (limit, prompt) = (u64::from(limit), prompt as u64);
    let asked = u64::from(max_tokens.unwrap_or(1));
    if prompt + asked > limit {
        return Err(FrontError::ContextLength { limit, prompt, asked });
    }
    let most = u32::try_from(limit - prompt).unwrap_or(u32::MAX);
    Ok(max_tokens.unwrap_or(most))
}

/// Whether a request means the served model: by its name, or by none.
pub(crate) fn check_model(asked: &str, model: &ServedModel) -> Result<(), FrontError> {
    if asked.is_empty() || asked == model.name {
        return Ok(());
    }
    Err(FrontError::ModelNotFound { asked: shortened(asked), served: model.name.clone() })
}

/// Checks tokens that were given as ids.
pub(crate) fn check_ids(param: &str, ids: &[u32], vocab: usize) -> Result<(), Error> {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(invalid(param, format!("token id {id}"), format!("ids below {vocab}"))),
        None => Ok(()),
    }
}

/// The message of a field that is wrong: its name, what was found, what was expected.
pub(crate) fn invalid(param: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::invalid(format!("{param}: found {found}, expected {expected}")).with_param(param)
}

fn sampling(options: SamplingOptions, model: &ServedModel, seed: u64) -> Result<Sampling, Error> {
    let defaults = &model.defaults;
    let pick = |given: Option<f32>, default: Option<f32>, neutral: f32| given.or(default).unwrap_or(neutral);
    let penalty =
        within("repetition_penalty", pick(options.repetition_penalty, defaults.repetition_penalty, 1.0), 0.0..=10.0)?;
    let top_p = within("top_p", pick(options.top_p, defaults.top_p, 1.0), 0.0..=1.0)?;
    Ok(Sampling {
        seed: options.seed.unwrap_or(seed),
        temperature: within("temperature", pick(options.temperature, defaults.temperature, 1.0), 0.0..=2.0)?,
        top_k: options.top_k.or(defaults.top_k).unwrap_or(0),
        top_p: above_zero("top_p", top_p)?,
        min_p: within("min_p", options.min_p.unwrap_or(0.0), 0.0..=1.0)?,
        repetition_penalty: above_zero("repetition_penalty", penalty)?,
        presence_penalty: within("presence_penalty", options.presence_penalty.unwrap_or(0.0), -2.0..=2.0)?,
        frequency_penalty: within("frequency_penalty", options.frequency_penalty.unwrap_or(0.0), -2.0..=2.0)?,
        logit_bias: logit_bias(options.logit_bias, model.config.vocab)?,
        min_tokens: options.min_tokens.unwrap_or(0),
    })
}

fn logit_bias(bias: HashMap<u32, f32>, vocab: usize) -> Result<HashMap<u32, f32>, Error> {
    at_most("logit_bias entries", count(bias.len()), count(MAX_LOGIT_BIAS)).map_err(|e| e.with_param("logit_bias"))?;
    for (&token, &value) in &bias {
        check_ids("logit_bias", &[token], vocab)?;
        within("logit_bias", value, -100.0..=100.0)?;
    }
    Ok(bias)
}

fn max_tokens(request: &GenerateRequest, min_tokens: u32) -> Result<Option<u32>, Error> {
    match request.max_tokens {
        Some(0) if request.prompt_logprobs.is_none() => {
            Err(invalid("max_tokens", 0, "at least 1, or 0 together with logprobs of the prompt"))
        }
        Some(most) if min_tokens > most => {
            Err(invalid("min_tokens", min_tokens, format!("at most max_tokens, which is {most}")))
        }
        most => Ok(most),
    }
}

fn stop_tokens(request: &GenerateRequest, model: &ServedModel, vocab: usize) -> Result<Vec<u32>, Error> {
    at_most("stop_token_ids", count(request.stop_token_ids.len()), count(MAX_STOP_TOKENS))?;
    check_ids("stop_token_ids", &request.stop_token_ids, vocab)?;
    let eos: &[u32] = if request.ignore_eos { &[] } else { &model.defaults.eos };
    let mut ids: Vec<u32> = eos.iter().chain(&request.stop_token_ids).copied().collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn check_stops(stops: &[String], model: &ServedModel, config: &FrontConfig) -> Result<(), Error> {
    if stops.is_empty() {
        return Ok(());
    }
    if model.text.is_none() {
        return Err(no_tokenizer("stop"));
    }
    if stops.len() > config.max_stops {
        return Err(invalid("stop", format!("{} strings", stops.len()), format!("at most {}", config.max_stops)));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        Some(stop) => {
            Err(invalid("stop", format!("a string of {} bytes", stop.len()), format!("1 to {MAX_STOP_BYTES} bytes")))
        }
        None => Ok(()),
    }
}

/// Text was asked of a model without a tokenizer.
pub(crate) fn no_tokenizer(param: &str) -> Error {
    invalid(param, "text", "token ids: this model's checkpoint has no tokenizer")
}

fn logprobs(param: &str, asked: Option<u32>, config: &FrontConfig) -> Result<Option<u32>, Error> {
    if let Some(asked) = asked {
        at_most(param, asked, config.max_logprobs)?;
    }
    Ok(asked)
}

fn timeout(asked_ms: u64, config: &FrontConfig) -> Result<Duration, Error> {
    let most = u64::try_from(config.max_timeout.as_millis()).unwrap_or(u64::MAX);
    match asked_ms {
        0 => Ok(config.default_timeout),
        ms if ms > most => Err(invalid("timeout_ms", ms, format!("at most {most}"))),
        ms => Ok(Duration::from_millis(ms)),
    }
}

pub(crate) fn at_most(param: &str, found: u32, most: u32) -> Result<(), Error> {
    if found <= most { Ok(()) } else { Err(invalid(param, found, format!("at most {most}"))) }
}

fn within(param: &str, value: f32, range: RangeInclusive<f32>) -> Result<f32, Error> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(invalid(param, value, format!("{} to {}", range.start(), range.end())))
}

fn above_zero(param: &str, value: f32) -> Result<f32, Error> {
    if value > 0.0 { Ok(value) } else { Err(invalid(param, value, "more than 0")) }
}

/// A name out of a request as a message shows it.
fn shortened(name: &str) -> String {
    const MOST: usize = 100;
    if name.chars().count() <= MOST { name.to_owned() } else { name.chars().take(MOST).chain(['…']).collect() }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
