//! The front's settings and bounds.

use std::time::Duration;

use conclave_serve::Error;

/// Settings of the front.
#[derive(Debug, Clone)]
pub struct FrontConfig {
    /// Longest context in tokens; `None`: the model's.
    pub context_limit: Option<u32>,
    /// Largest prompt text in bytes, of all messages of a chat together.
    pub max_prompt_bytes: usize,
    /// Sequences that run at the same time; more are refused.
    pub max_sequences: usize,
    /// Prompts that are tokenised at the same time; more wait.
    pub tokenizer_threads: usize,
    /// Most choices of one prompt.
    pub max_choices: u32,
    /// Most prompts of one request.
    pub max_prompts: usize,
    /// Most of the likeliest tokens reported beside each.
    pub max_logprobs: u32,
    /// Most stop strings.
    pub max_stops: usize,
    /// Deadline of a request that sets none.
    pub default_timeout: Duration,
    /// Longest deadline that a request may set.
    pub max_timeout: Duration,
    /// How often a sequence is handed to a replica before it ends with the error of the last one.
    pub max_tries: u32,
    /// The same for a sequence that no replica has taken yet.
    pub max_first_tries: u32,
    /// How long a broken sequence waits for a replica that can take it over.
    pub recovery: Duration,
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            context_limit: None,
            max_prompt_bytes: 4 << 20,
            max_sequences: 4096,
            tokenizer_threads: std::thread::available_parallelism().map_or(2, usize::from),
            max_choices: 128,
            max_prompts: 1024,
            max_logprobs: 20,
            max_stops: 16,
            default_timeout: Duration::from_secs(600),
            max_timeout: Duration::from_secs(3600),
            max_tries: 16,
            max_first_tries: 3,
            recovery: Duration::from_secs(30),
        }
    }
}

impl FrontConfig {
    /// Checks that every bound allows something.
    ///
    /// # Errors
    /// Naming the bound that is zero.
    pub fn check(&self) -> Result<(), Error> {
        let bounds = [
            ("context_limit", self.context_limit.unwrap_or(1) as usize),
            ("max_prompt_bytes", self.max_prompt_bytes),
            ("max_sequences", self.max_sequences),
            ("tokenizer_threads", self.tokenizer_threads),
            ("max_choices", self.max_choices as usize),
            ("max_prompts", self.max_prompts),
            ("max_tries", self.max_tries as usize),
            ("max_first_tries", self.max_first_tries as usize),
        ];
        match bounds.iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(Error::invalid(format!("{name}: found 0, expected at least 1")).with_param(*name)),
            None => Ok(()),
        }
    }
}
