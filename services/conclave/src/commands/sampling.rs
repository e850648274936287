//! Sampling settings as flags, the same for every client.

use clap::Args;
use serde::Serialize;

/// How tokens are chosen. What is not given is left to the server.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Seed: the same one gives the same tokens again.
    #[arg(long, env = "CONCLAVE_SEED", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// 0 takes the likeliest token each time; higher is more varied.
    #[arg(long, env = "CONCLAVE_TEMPERATURE", value_name = "X", value_parser = number, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Draws from this many likeliest tokens only; 0: all.
    #[arg(long, env = "CONCLAVE_TOP_K", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Draws from the fewest likeliest tokens that have this share of the probability together.
    #[arg(long, env = "CONCLAVE_TOP_P", value_name = "X", value_parser = number, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Leaves out tokens less likely than this share of the likeliest one.
    #[arg(long, env = "CONCLAVE_MIN_P", value_name = "X", value_parser = number, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that occur in prompt or output; 1: not at all.
    #[arg(long, env = "CONCLAVE_REPETITION_PENALTY", value_name = "X", value_parser = number, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Taken off the logits of tokens that occur in the output.
    #[arg(long, env = "CONCLAVE_PRESENCE_PENALTY", value_name = "X", value_parser = number, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// The same, once for each time that they occur.
    #[arg(long, env = "CONCLAVE_FREQUENCY_PENALTY", value_name = "X", value_parser = number, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
}

/// A number that JSON has, too.
///
/// # Errors
/// When it is none, or not finite.
pub fn number(value: &str) -> Result<f32, String> {
    match value.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err(format!("{value:?}: expected a finite number")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn parse(args: &[&str]) -> Result<SamplingArgs, String> {
        let parsed = Command::try_parse_from([&["x"], args].concat());
        parsed.map(|command| command.sampling).map_err(|error| error.to_string())
    }

    #[test]
    fn only_what_is_given_is_sent_and_as_it_was_typed() {
        let sampling = parse(&["--temperature", "0.7", "--presence-penalty", "-1.5", "--seed", "9007199254740993"]);
        let json = serde_json::to_string(&sampling.expect("valid")).expect("JSON");
        assert_eq!(json, r#"{"seed":9007199254740993,"temperature":0.7,"presence_penalty":-1.5}"#);
        assert_eq!(serde_json::to_string(&parse(&[]).expect("valid")).expect("JSON"), "{}");
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for wrong in ["nan", "inf", "1e99", "hot"] {
            let error = parse(&["--temperature", wrong]).expect_err("refused");
            assert!(error.contains(&format!("{wrong:?}: expected a finite number")), "{error}");
        }
    }
}
