//! From flags to a request.

use std::{collections::HashMap, time::Duration};

use anyhow::Result;
use clap::Args;
use conclave_proto::v1::{Chat, GenerateRequest, Message, Prompt, SamplingOptions, TokenIds, prompt};

use crate::commands::{SamplingArgs, sampling::number};

/// What is to be generated.
#[derive(Debug, Clone, Default, Args)]
pub struct RequestArgs {
    /// Text to go on with; `-` reads it from standard input.
    #[arg(value_name = "PROMPT", required_unless_present = "tokens")]
    pub prompt: Option<String>,
    /// The prompt is a user's message, to be put into the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// A system message before it.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// Prompt as token ids, taken as they are.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "chat"])]
    pub tokens: Vec<u32>,
    /// Model to ask for [default: the one that is served].
    #[arg(long, env = "CONCLAVE_MODEL_NAME", value_name = "NAME")]
    pub model: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Added to the logit of a token; may be given several times.
    #[arg(long, value_name = "ID:VALUE", value_parser = bias, help_heading = "Sampling")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Independent answers.
    #[arg(short = 'n', long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Sampling")]
    pub choices: u32,
    /// Tokens at most [default: up to the context limit].
    #[arg(long, env = "CONCLAVE_MAX_TOKENS", value_name = "N", help_heading = "Limits")]
    pub max_tokens: Option<u32>,
    /// Tokens before the answer may end.
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub min_tokens: Option<u32>,
    /// Text at which the answer ends; may be given several times.
    #[arg(long, value_name = "TEXT", help_heading = "Limits")]
    pub stop: Vec<String>,
    /// Keeps the stop text in the answer.
    #[arg(long, requires = "stop", help_heading = "Limits")]
    pub include_stop: bool,
    /// Token at which the answer ends, besides the model's own; may be given several times.
    #[arg(long, value_name = "ID", help_heading = "Limits")]
    pub stop_token: Vec<u32>,
    /// Goes on past the model's own end tokens.
    #[arg(long, help_heading = "Limits")]
    pub ignore_eos: bool,
    /// Seconds after which the request ends, tries to reconnect included [default: the server's].
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Limits")]
    pub timeout: Option<Duration>,
    /// Logprob of every token, and of this many likeliest ones beside it.
    #[arg(long, value_name = "N", requires = "json", help_heading = "Scores")]
    pub logprobs: Option<u32>,
    /// The same for the prompt; with `--max-tokens 0` for the prompt only.
    #[arg(long, value_name = "N", requires = "json", help_heading = "Scores")]
    pub prompt_logprobs: Option<u32>,
}

impl RequestArgs {
    /// The request, whose deadline is set when it is sent; `stdin` gives the prompt of `-`.
    ///
    /// # Errors
    /// Those of `stdin`.
    pub fn request(&self, stdin: impl FnOnce() -> Result<String>) -> Result<GenerateRequest> {
        let text = match self.prompt.as_deref() {
            Some("-") => stdin()?,
            text => text.unwrap_or_default().to_owned(),
        };
        Ok(GenerateRequest {
            model: self.model.clone().unwrap_or_default(),
            prompt: Some(Prompt { prompt: Some(self.prompt(text)) }),
            sampling: Some(self.sampling()),
            max_tokens: self.max_tokens,
            choices: self.choices,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            timeout_ms: self.timeout.map_or(0, milliseconds),
            include_stop: self.include_stop,
            resume: Vec::new(),
        })
    }

    fn prompt(&self, text: String) -> prompt::Prompt {
        let message = |role: &str, content: String| Message { role: role.to_owned(), content };
        if self.chat {
            let system = self.system.clone().map(|system| message("system", system));
            let messages = system.into_iter().chain([message("user", text)]).collect();
            prompt::Prompt::Chat(Chat { messages })
        } else if self.tokens.is_empty() {
            prompt::Prompt::Text(text)
        } else {
            prompt::Prompt::Tokens(TokenIds { ids: self.tokens.clone() })
        }
    }

    fn sampling(&self) -> SamplingOptions {
        let flags = &self.sampling;
        SamplingOptions {
            seed: flags.seed,
            temperature: flags.temperature,
            top_k: flags.top_k,
            top_p: flags.top_p,
            min_p: flags.min_p,
            repetition_penalty: flags.repetition_penalty,
            presence_penalty: flags.presence_penalty,
            frequency_penalty: flags.frequency_penalty,
            logit_bias: self.logit_bias.iter().copied().collect::<HashMap<_, _>>(),
            min_tokens: self.min_tokens,
        }
    }
}

/// A deadline as requests have it: at least 1, since 0 is none.
pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

fn bias(value: &str) -> Result<(u32, f32), String> {
    let parsed = value.split_once(':').and_then(|(id, bias)| Some((id.parse().ok()?, number(bias).ok()?)));
    parsed.ok_or_else(|| format!("{value:?}: expected ID:VALUE, as 42:-5"))
}

fn seconds(value: &str) -> Result<Duration, String> {
    let parsed = value.parse().ok().filter(|seconds| *seconds > 0.0);
    let time = parsed.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.ok_or_else(|| format!("{value:?}: expected seconds, more than 0"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::commands::generate::GenerateArgs;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        generate: GenerateArgs,
    }

    fn parse(args: &[&str]) -> Result<GenerateRequest, String> {
        let parsed = Command::try_parse_from([&["x"], args].concat()).map_err(|error| error.to_string())?;
        let request = parsed.generate.request.request(|| Ok("from stdin".to_owned()));
        Ok(request.expect("stdin can be read"))
    }

    fn prompt(args: &[&str]) -> prompt::Prompt {
        parse(args).expect("valid").prompt.and_then(|prompt| prompt.prompt).expect("a prompt")
    }

    #[test]
    fn every_kind_of_prompt() {
        assert_eq!(prompt(&["hi"]), prompt::Prompt::Text("hi".to_owned()));
        assert_eq!(prompt(&["-"]), prompt::Prompt::Text("from stdin".to_owned()));
        assert_eq!(prompt(&["--tokens", "1,2"]), prompt::Prompt::Tokens(TokenIds { ids: vec![1, 2] }));
        let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
        let messages = vec![message("system", "be brief"), message("user", "hi")];
        assert_eq!(prompt(&["--chat", "hi", "--system", "be brief"]), prompt::Prompt::Chat(Chat { messages }));
    }

    #[test]
    fn every_setting_arrives() {
        let request = parse(&[
            "x",
            "--json",
            "-n",
            "2",
            "--temperature",
            "0.5",
            "--top-k",
            "5",
            "--top-p",
            "0.9",
            "--min-p",
            "0.1",
            "--repetition-penalty",
            "1.1",
            "--presence-penalty",
            "0.2",
            "--frequency-penalty",
            "-0.3",
            "--seed",
            "8",
            "--logit-bias",
            "7:-5",
            "--logit-bias",
            "8:2.5",
            "--min-tokens",
            "3",
            "--max-tokens",
            "9",
            "--stop",
            "a",
            "--stop",
            "b",
            "--include-stop",
            "--stop-token",
            "4",
            "--ignore-eos",
            "--timeout",
            "1.5",
            "--logprobs",
            "0",
            "--prompt-logprobs",
            "1",
            "--model",
            "m",
        ]);
        let sampling = SamplingOptions {
            seed: Some(8),
            temperature: Some(0.5),
            top_k: Some(5),
            top_p: Some(0.9),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(0.2),
            frequency_penalty: Some(-0.3),
            logit_bias: HashMap::from([(7, -5.0), (8, 2.5)]),
            min_tokens: Some(3),
        };
        let expected = GenerateRequest {
            model: "m".to_owned(),
            prompt: Some(Prompt { prompt: Some(prompt::Prompt::Text("x".to_owned())) }),
            sampling: Some(sampling),
            max_tokens: Some(9),
            choices: 2,
            stop: vec!["a".to_owned(), "b".to_owned()],
            stop_token_ids: vec![4],
            ignore_eos: true,
            logprobs: Some(0),
            prompt_logprobs: Some(1),
            timeout_ms: 1500,
            include_stop: true,
            resume: Vec::new(),
        };
        assert_eq!(request, Ok(expected));
    }

    #[test]
    fn wrong_flags_are_refused_with_a_reason() {
        for (args, reason) in [
            (&[][..], "PROMPT"),
            (&["x", "--tokens", "1"], "cannot be used with"),
            (&["x", "--system", "s"], "--chat"),
            (&["x", "--logprobs", "1"], "--json"),
            (&["x", "--logit-bias", "7"], "expected ID:VALUE"),
            (&["x", "--timeout", "0"], "more than 0"),
            (&["x", "-n", "0"], "0 is not in 1.."),
            (&["x", "--url", "https://a:1"], "only http is supported"),
        ] {
            let error = parse(args).expect_err("refused");
            assert!(error.contains(reason), "{args:?}: {error}");
        }
    }
}
