//! One sequence, from its first to its last token, over as many replicas as that takes.

use std::{sync::Arc, time::Duration};

use async_stream::try_stream;
use conclave_proto::v1::{PromptScores, ScoredToken, SequenceRequest, TokenEvent, token_event::Event};
use conclave_serve::{Error, ErrorKind};
use futures::{
    StreamExt,
    stream::{BoxStream, Stream},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    FrontConfig,
    metrics::Metrics,
    prefixes,
    replicas::{Place, Preference, Replicas},
};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A sequence and what is known of it so far: enough for any replica to go on.
pub(crate) struct Sequence {
    /// With the prompt and all tokens generated so far.
    request: SequenceRequest,
    deadline: Instant,
    replicas: Arc<Replicas>,
    metrics: Arc<Metrics>,
    bounds: Bounds,
    preference: Preference,
    tries: u32,
    /// Prompt positions below this one have been reported.
    scored: u32,
    /// Whether replicas of several numerics ids took part, or one that is not exact.
    mixed: bool,
}

/// How hard a sequence tries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    max_tries: u32,
    max_first_tries: u32,
    recovery: Duration,
}

impl From<&FrontConfig> for Bounds {
    fn from(config: &FrontConfig) -> Self {
        Self { max_tries: config.max_tries, max_first_tries: config.max_first_tries, recovery: config.recovery }
    }
}

/// A sequence that a replica has taken.
pub(crate) struct Running {
    sequence: Sequence,
    attempt: Attempt,
}

struct Attempt {
    place: Place,
    events: BoxStream<'static, Result<TokenEvent, Error>>,
}

impl Sequence {
    pub(crate) fn new(
        request: SequenceRequest,
        deadline: Instant,
        replicas: Arc<Replicas>,
        metrics: Arc<Metrics>,
        bounds: Bounds,
    ) -> Self {
        let chain = prefixes::chain(&request.cache_salt, &request.tokens);
        let preference = Preference { chain, ..Preference::default() };
        Self { request, deadline, replicas, metrics, bounds, preference, tries: 0, scored: 0, mixed: false }
    }

    /// Finds a replica that takes the sequence.
    ///
    /// # Errors
    /// With what the last replica said, when none takes it.
    pub(crate) async fn start(mut self) -> Result<Running, Error> {
        let attempt = self.place(self.bounds.max_first_tries, Instant::now()).await?;
        Ok(Running { sequence: self, attempt })
    }

    /// Goes on elsewhere (or there again, once it is back) after the stream broke with `error`.
    async fn recover(&mut self, place: Place, error: Error) -> Result<Attempt, Error> {
        self.failed(&place, &error);
        drop(place);
        if !may_continue(error.kind) || self.tries >= self.bounds.max_tries {
            return Err(error);
        }
        self.metrics.failovers.inc();
        tracing::warn!(%error, tokens = self.request.tokens.len(), "sequence broke, resubmitting");
        let patience = Instant::now() + self.bounds.recovery;
        self.place(self.bounds.max_tries, patience).await
    }

    /// Offers the sequence to replicas until one takes it, `max_tries` are spent, or (where none is there) `patience`
    /// is over.
    async fn place(&mut self, max_tries: u32, patience: Instant) -> Result<Attempt, Error> {
        let mut changes = self.replicas.changes();
        loop {
            changes.mark_unchanged();
            let Some(place) = self.replicas.take(&self.preference) else {
                if timeout_at(patience.min(self.deadline), changes.changed()).await.is_ok_and(|seen| seen.is_ok()) {
                    continue;
                }
                return Err(if Instant::now() >= self.deadline { self.late() } else { nobody() });
            };
            self.pause(&place).await;
            self.tries += 1;
            let request = self.remaining();
            let asked = timeout_at(self.deadline, self.replicas.generate(&place, request)).await;
            match asked.unwrap_or_else(|_| Err(self.late())) {
                Ok(events) => {
                    self.taken_by(&place);
                    return Ok(Attempt { place, events });
                }
                Err(error) => {
                    let again = self.failed(&place, &error);
                    if !again || self.tries >= max_tries {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Notes that a replica did not serve the sequence; whether another may.
    fn failed(&mut self, place: &Place, error: &Error) -> bool {
        let fresh = !self.preference.avoid.contains(place.instance());
        if fresh {
            self.preference.avoid.push(place.instance().clone());
        }
        if error.kind == ErrorKind::Unavailable {
            self.replicas.disconnect(place);
        }
        may_continue(error.kind) || (error.kind == ErrorKind::ResourceExhausted && fresh)
    }

    /// Waits before a replica that failed this sequence is asked again, longer each time.
    async fn pause(&self, place: &Place) {
        if self.preference.avoid.contains(place.instance()) {
            let pause = FIRST_PAUSE * 2u32.saturating_pow(self.tries.min(8));
            sleep(pause.min(LONGEST_PAUSE).min(self.left())).await;
        }
    }

    fn taken_by(&mut self, place: &Place) {
        let first = self.preference.numerics.get_or_insert_with(|| place.numerics().to_owned());
        self.mixed |= first != place.numerics();
    }

    /// The request for what is still missing.
    fn remaining(&self) -> SequenceRequest {
        let mut request = self.request.clone();
        request.budget_ms = u64::try_from(self.left().as_millis()).unwrap_or(u64::MAX).max(1);
        if self.generated() > 0 {
            request.prompt_logprobs = None;
        }
        request
    }

    fn generated(&self) -> usize {
        self.request.tokens.len() - self.request.prompt_len as usize
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn late(&self) -> Error {
        let message = format!("deadline exceeded after {} generated tokens", self.generated());
        Error::new(ErrorKind::DeadlineExceeded, message)
    }

    /// Takes an event in; `None` for what a replica that took over says again.
    fn accept(&mut self, event: Event) -> Result<Option<Event>, Error> {
        match event {
            Event::Prompt(scores) => {
                let known = self.scored;
                let tokens: Vec<_> = scores.tokens.into_iter().filter(|token| token.position >= known).collect();
                self.scored = tokens.last().map_or(known, |token| token.position + 1);
                Ok((!tokens.is_empty()).then_some(Event::Prompt(PromptScores { tokens })))
            }
            Event::Token(token) => {
                self.check_position(&token)?;
                self.request.tokens.push(token.token);
                Ok(Some(Event::Token(token)))
            }
            Event::Finished(finished) => {
                self.mixed |= finished.mixed_numerics;
                Ok(Some(Event::Finished(finished)))
            }
        }
    }

    /// A replica that repeats or leaves out a token would spoil the text silently.
    fn check_position(&self, token: &ScoredToken) -> Result<(), Error> {
        let expected = self.request.tokens.len();
        if token.position as usize == expected {
            return Ok(());
        }
        let message = format!("attention sent a token at position {}, expected position {expected}", token.position);
        Err(Error::new(ErrorKind::Internal, message))
    }
}

impl Running {
    /// The sequence's events, each with whether replicas of one numerics id made everything up to it. Failures are hidden
    /// as long as a replica can go on.
    pub(crate) fn events(mut self) -> impl Stream<Item = Result<(Event, bool), Error>> + Send {
        try_stream! {
            loop {
                let next = timeout_at(self.sequence.deadline, self.attempt.events.next()).await;
                let error = match next.map_err(|_| self.sequence.late())? {
                    Some(Ok(TokenEvent { event: Some(event), inexact })) => {
                        self.sequence.mixed |= inexact;
                        let last = matches!(event, Event::Finished(_));
                        if let Some(event) = self.sequence.accept(event)? {
                            yield (event, !self.sequence.mixed);
                        }
                        if last {
                            return;
                        }
                        continue;
                    }
                    Some(Ok(TokenEvent { event: None, .. })) => continue,
                    Some(Err(error)) => error,
                    None => Error::new(ErrorKind::Unavailable, "attention ended its stream before the sequence"),
                };
                let Attempt { place, events } = self.attempt;
                drop(events);
                self.attempt = self.sequence.recover(place, error).await?;
            }
        }
    }
}

/// Whether another replica may do what one could not. What a replica says about the request itself, any would say.
fn may_continue(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unavailable | ErrorKind::Internal | ErrorKind::FailedPrecondition)
}

fn nobody() -> Error {
    Error::new(ErrorKind::Unavailable, "no attention replica of this checkpoint is ready")
}
