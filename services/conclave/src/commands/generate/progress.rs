//! What came of a request so far, and what to ask for to get the rest.

use conclave_proto::v1::{
    Delta, Finished, GenerateEvent, GenerateRequest, Prompt, Resume, SamplingOptions, Started, TokenIds,
    generate_event::Event, prompt,
};

/// A request and all that was received of its answer.
#[derive(Debug)]
pub struct Progress {
    request: GenerateRequest,
    started: Option<Started>,
    choices: Vec<Choice>,
    /// Whether servers of several numerics ids took part.
    mixed: bool,
}

/// What was received of one choice.
#[derive(Debug, Default)]
struct Choice {
    tokens: Vec<u32>,
    /// Text that came without a token: the end of the answer, which comes again if the connection breaks before
    /// `Finished`.
    held: String,
    scored: bool,
    finished: bool,
}

impl Progress {
    /// Nothing has come yet.
    pub fn new(request: GenerateRequest) -> Self {
        let choices = (0..request.choices.max(1)).map(|_| Choice::default()).collect();
        Self { request, started: None, choices, mixed: false }
    }

    /// The request for what is still missing: at first the request itself, afterwards the unfinished choices, each behind
    /// its tokens.
    pub fn rest(&self) -> GenerateRequest {
        let Some(started) = &self.started else { return self.request.clone() };
        let tokens = prompt::Prompt::Tokens(TokenIds { ids: started.prompt_tokens.clone() });
        let sampling = self.request.sampling.clone().unwrap_or_default();
        let unfinished = (0..).zip(&self.choices).filter(|(_, choice)| !choice.finished);
        GenerateRequest {
            prompt: Some(Prompt { prompt: Some(tokens) }),
            sampling: Some(SamplingOptions { seed: Some(started.seed), ..sampling }),
            resume: unfinished.map(|(choice, of)| Resume { choice, tokens: of.tokens.clone() }).collect(),
            ..self.request.clone()
        }
    }

    /// The stream broke: what has come only in part will come again.
    pub fn broke(&mut self) {
        self.choices.iter_mut().for_each(|choice| choice.held.clear());
    }

    /// A server of another numerics id goes on.
    pub fn mix(&mut self) {
        self.mixed = true;
    }

    /// Takes the next event in; the events that are news.
    ///
    /// # Errors
    /// When the event does not go on where the answer was.
    pub fn accept(&mut self, event: GenerateEvent) -> Result<Vec<GenerateEvent>, String> {
        let GenerateEvent { choice, event: Some(inner) } = event else { return Ok(Vec::new()) };
        let (prompt, mixed) = (self.started.as_ref().map(|started| started.prompt_tokens.len()), self.mixed);
        let of =
            self.choices.get_mut(choice as usize).ok_or_else(|| format!("found choice {choice}, expected fewer"))?;
        let news = match inner {
            Event::Started(started) => return self.start(started),
            Event::Prompt(_) if std::mem::replace(&mut of.scored, true) => Vec::new(),
            Event::Prompt(scores) => vec![Event::Prompt(scores)],
            Event::Delta(delta) if delta.tokens.is_empty() => {
                of.held.push_str(&delta.text);
                Vec::new()
            }
            Event::Delta(delta) => {
                of.check(&delta, prompt.unwrap_or(0))?;
                of.tokens.extend(delta.tokens.iter().map(|token| token.token));
                vec![Event::Delta(delta)]
            }
            Event::Finished(finished) => {
                of.finished = true;
                of.end(Finished { exact: finished.exact && !mixed, ..finished })
            }
        };
        Ok(news.into_iter().map(|event| GenerateEvent { choice, event: Some(event) }).collect())
    }

    /// The first event of a stream: news only in the first stream.
    fn start(&mut self, started: Started) -> Result<Vec<GenerateEvent>, String> {
        match &self.started {
            None => {
                self.started = Some(started.clone());
                Ok(vec![GenerateEvent { choice: 0, event: Some(Event::Started(started)) }])
            }
            Some(known) if known.seed == started.seed && known.prompt_tokens == started.prompt_tokens => Ok(Vec::new()),
            Some(known) => Err(format!(
                "found seed {} and {} prompt tokens, expected seed {} and the {} prompt tokens sent",
                started.seed,
                started.prompt_tokens.len(),
                known.seed,
                known.prompt_tokens.len()
            )),
        }
    }

    /// Tokens received, of all choices.
    pub fn tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.tokens.len()).sum()
    }

    /// Whether everything has come.
    pub fn complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }
}

impl Choice {
    /// A token that is repeated or left out would spoil the answer silently.
    fn check(&self, delta: &Delta, prompt: usize) -> Result<(), String> {
        let expected = prompt + self.tokens.len();
        let mut positions = (expected..).zip(&delta.tokens);
        match positions.find(|(expected, token)| token.position as usize != *expected) {
            Some((expected, token)) => {
                Err(format!("found a token of position {}, expected position {expected}", token.position))
            }
            None => Ok(()),
        }
    }

    /// The held text and the end.
    fn end(&mut self, finished: Finished) -> Vec<Event> {
        let text = std::mem::take(&mut self.held);
        let rest = (!text.is_empty()).then_some(Event::Delta(Delta { text, tokens: Vec::new() }));
        rest.into_iter().chain([Event::Finished(finished)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::{PromptScores, ScoredToken};

    use super::*;

    fn request(choices: u32) -> GenerateRequest {
        let sampling = SamplingOptions { temperature: Some(0.5), ..SamplingOptions::default() };
        let prompt = Prompt { prompt: Some(prompt::Prompt::Text("ab".to_owned())) };
        GenerateRequest { prompt: Some(prompt), sampling: Some(sampling), choices, ..GenerateRequest::default() }
    }

    fn event(choice: u32, event: Event) -> GenerateEvent {
        GenerateEvent { choice, event: Some(event) }
    }

    fn started(seed: u64) -> GenerateEvent {
        let started = Started { seed, prompt_tokens: vec![8, 9], ..Started::default() };
        event(0, Event::Started(started))
    }

    fn delta(choice: u32, position: u32, token: u32, text: &str) -> GenerateEvent {
        let tokens = vec![ScoredToken { token, position, ..ScoredToken::default() }];
        event(choice, Event::Delta(Delta { text: text.to_owned(), tokens }))
    }

    fn rest(choice: u32, text: &str) -> GenerateEvent {
        event(choice, Event::Delta(Delta { text: text.to_owned(), tokens: Vec::new() }))
    }

    fn finished(choice: u32) -> GenerateEvent {
        event(choice, Event::Finished(Finished { exact: true, ..Finished::default() }))
    }

    fn after(choices: u32, events: Vec<GenerateEvent>) -> Progress {
        let mut progress = Progress::new(request(choices));
        events.into_iter().for_each(|event| {
            progress.accept(event).expect("in order");
        });
        progress
    }

    #[test]
    fn before_anything_came_the_request_is_sent_again() {
        assert_eq!(Progress::new(request(1)).rest(), request(1));
    }

    #[test]
    fn afterwards_each_unfinished_choice_goes_on_behind_its_tokens() {
        let mut progress = after(3, vec![started(7), delta(1, 2, 50, "x"), delta(0, 2, 60, "y"), finished(0)]);
        progress.accept(delta(1, 3, 51, "")).expect("in order");
        let tokens = prompt::Prompt::Tokens(TokenIds { ids: vec![8, 9] });
        let of = |choice, tokens: &[u32]| Resume { choice, tokens: tokens.to_vec() };
        let expected = GenerateRequest {
            prompt: Some(Prompt { prompt: Some(tokens) }),
            sampling: Some(SamplingOptions { temperature: Some(0.5), seed: Some(7), ..SamplingOptions::default() }),
            resume: vec![of(1, &[50, 51]), of(2, &[])],
            ..request(3)
        };
        assert_eq!(progress.rest(), expected);
        assert_eq!((progress.tokens(), progress.complete()), (3, false));
    }

    #[test]
    fn what_comes_again_is_no_news() {
        let mut progress = after(1, vec![started(7), event(0, Event::Prompt(PromptScores::default()))]);
        progress.broke();
        assert_eq!(progress.accept(started(7)), Ok(Vec::new()));
        assert_eq!(progress.accept(event(0, Event::Prompt(PromptScores::default()))), Ok(Vec::new()));
        assert_eq!(progress.accept(delta(0, 2, 50, "x")), Ok(vec![delta(0, 2, 50, "x")]));
    }

    #[test]
    fn text_without_a_token_waits_for_the_end() {
        let mut progress = after(1, vec![started(7), delta(0, 2, 50, "x"), rest(0, "tail")]);
        progress.broke();
        assert_eq!(progress.accept(rest(0, "tail")), Ok(Vec::new()));
        assert_eq!(progress.accept(finished(0)), Ok(vec![rest(0, "tail"), finished(0)]));
        assert!(progress.complete());
    }

    #[test]
    fn a_stream_that_does_not_go_on_there_is_an_error() {
        let mut progress = after(1, vec![started(7), delta(0, 2, 50, "x")]);
        let error = "found a token of position 2, expected position 3";
        assert_eq!(progress.accept(delta(0, 2, 50, "x")), Err(error.to_owned()));
        let error = "found seed 8 and 2 prompt tokens, expected seed 7 and the 2 prompt tokens sent";
        assert_eq!(progress.accept(started(8)), Err(error.to_owned()));
        assert!(progress.accept(delta(1, 3, 50, "x")).is_err());
    }

    #[test]
    fn servers_of_several_numerics_are_not_exact() {
        let mut progress = after(1, vec![started(7)]);
        progress.mix();
        let ended = event(0, Event::Finished(Finished { exact: false, ..Finished::default() }));
        assert_eq!(progress.accept(finished(0)), Ok(vec![ended]));
    }
}
