//! Answers that go on where their client's stream broke.

use std::collections::HashSet;

use conclave_proto::v1::{GenerateRequest, Resume, SequenceRequest};
use conclave_serve::Error;

use super::resolve::{at_most, check_ids, invalid};

/// The choices that a request runs, each with what was generated of it before: those that it resumes, else all of them
/// from the prompt's end.
///
/// # Errors
/// When a choice is not one of the request's or comes twice, an id is not below `vocab`, or the seed that made the tokens
/// is missing.
pub(super) fn choices(request: &GenerateRequest, vocab: usize, most: u32) -> Result<Vec<Resume>, Error> {
    let choices = request.choices.max(1);
    at_most("choices", choices, most)?;
    if request.resume.is_empty() {
        return Ok((0..choices).map(|choice| Resume { choice, tokens: Vec::new() }).collect());
    }
    if request.sampling.as_ref().is_none_or(|options| options.seed.is_none()) {
        return Err(invalid("seed", "nothing", "the seed of the answer to resume"));
    }
    let mut seen = HashSet::new();
    for Resume { choice, tokens } in &request.resume {
        if *choice >= choices {
            return Err(invalid("resume", format!("choice {choice}"), format!("choices below {choices}")));
        }
        if !seen.insert(choice) {
            return Err(invalid("resume", format!("choice {choice} twice"), "each choice once"));
        }
        check_ids("resume", tokens, vocab)?;
    }
    Ok(request.resume.clone())
}

/// Whether every choice has room for what was generated of it before.
pub(super) fn fit(choices: &[Resume], max_tokens: u32) -> Result<(), Error> {
    match choices.iter().find(|resumed| resumed.tokens.len() > max_tokens as usize) {
        Some(Resume { choice, tokens }) => {
            let found = format!("{} tokens of choice {choice}", tokens.len());
            Err(invalid("resume", found, format!("at most max_tokens, which is {max_tokens}")))
        }
        None => Ok(()),
    }
}

/// The sequence of one choice. `shared` is what all choices have in common, with the prompt as its tokens.
pub(super) fn sequence(shared: &SequenceRequest, choice: &Resume) -> SequenceRequest {
    let tokens = [&shared.tokens[..], &choice.tokens].concat();
    SequenceRequest { choice: choice.choice, tokens, ..shared.clone() }
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::SamplingOptions;

    use super::*;

    fn of(choice: u32, tokens: &[u32]) -> Resume {
        Resume { choice, tokens: tokens.to_vec() }
    }

    fn request(resume: Vec<Resume>) -> GenerateRequest {
        let sampling = Some(SamplingOptions { seed: Some(7), ..SamplingOptions::default() });
        GenerateRequest { choices: 3, sampling, resume, ..GenerateRequest::default() }
    }

    #[test]
    fn only_resumed_choices_run() {
        assert_eq!(choices(&request(Vec::new()), 10, 8), Ok(vec![of(0, &[]), of(1, &[]), of(2, &[])]));
        let resume = vec![of(2, &[9]), of(0, &[])];
        assert_eq!(choices(&request(resume.clone()), 10, 8), Ok(resume));
        let without_seed = GenerateRequest { sampling: None, ..request(Vec::new()) };
        assert!(choices(&without_seed, 10, 8).is_ok(), "a seed is needed only to go on");
    }

    #[test]
    fn what_cannot_be_resumed_is_refused() {
        let refused = |request: GenerateRequest| choices(&request, 10, 8).expect_err("refused").message;
        assert_eq!(refused(request(vec![of(3, &[])])), "resume: found choice 3, expected choices below 3");
        assert_eq!(
            refused(request(vec![of(1, &[]), of(1, &[])])),
            "resume: found choice 1 twice, expected each choice once"
        );
        assert_eq!(refused(request(vec![of(1, &[10])])), "resume: found token id 10, expected ids below 10");
        let without_seed = GenerateRequest { sampling: None, ..request(vec![of(1, &[])]) };
        assert_eq!(refused(without_seed), "seed: found nothing, expected the seed of the answer to resume");
        assert_eq!(
            refused(GenerateRequest { choices: 9, ..request(Vec::new()) }),
            "choices: found 9, expected at most 8"
        );
    }

    #[test]
    fn tokens_count_as_generated() {
        assert_eq!(fit(&[of(0, &[]), of(1, &[1, 2])], 2), Ok(()));
        let error = fit(&[of(0, &[]), of(1, &[1, 2])], 1).expect_err("too many");
        assert_eq!(error.message, "resume: found 2 tokens of choice 1, expected at most max_tokens, which is 1");
        let shared = SequenceRequest { tokens: vec![5, 6], prompt_len: 2, max_tokens: 4, ..SequenceRequest::default() };
        let sequence = sequence(&shared, &of(1, &[7]));
        assert_eq!((sequence.choice, &sequence.tokens[..], sequence.prompt_len), (1, &[5, 6, 7][..], 2));
    }
}
