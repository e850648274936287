//! One request on its way through the engine.

use std::time::{Duration, Instant};

use conclave_kernels::{FoundToken, TokenAsk, TokenSource};
use conclave_proto::v1::{
    FinishReason, PromptScores, ScoredToken, SequenceFinished, TokenEvent, TokenLogprob, token_event::Event,
};
use conclave_serve::{Error, ErrorKind};
use tokio::sync::mpsc::UnboundedSender;
use tracing::Span;

use crate::cache::{BlockPool, BlockTable};
use crate::prefix::{PrefixChain, PrefixKey};
use crate::request::Request;
use crate::sampler::{self, History, Position, TokenMask};
use crate::scheduler::Demand;
use crate::state::Ticket;

/// Where a request's events go. Unbounded: a request has at most as many tokens as the context.
pub(crate) type Events = UnboundedSender<Result<TokenEvent, Error>>;

/// A sequence, running or waiting.
#[derive(Debug)]
pub(crate) struct Sequence {
    request: Request,
    history: History,
    /// Prompt positions before it have been scored.
    scored: usize,
    scores: Vec<ScoredToken>,
    /// Positions in the cache.
    pub(crate) computed: usize,
    pub(crate) blocks: BlockTable,
    /// Of the blocks that its tokens fill.
    chain: PrefixChain,
    /// Prompt positions that were in the cache when it first began.
    cached: usize,
    pub(crate) arrived: Instant,
    pub(crate) started: bool,
    pub(crate) deadline: Option<Instant>,
    /// Since when its experts cannot be reached.
    pub(crate) stalled_since: Option<Instant>,
    pub(crate) mixed_numerics: bool,
    /// Bits may depend on how its rows come together with others.
    pub(crate) inexact: bool,
    pub(crate) span: Span,
    events: Events,
    _ticket: Ticket,
}

/// What the logits of a row are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// The score of the prompt token at this position.
    Score(usize),
    /// The next token.
    Sample,
}

/// How a sequence ends well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// With this token, which is not part of the output.
    Stop(u32),
    /// At its limit.
    Length,
}

impl Sequence {
    pub(crate) fn new(request: Request, events: Events, span: Span, ticket: Ticket) -> Self {
        let arrived = Instant::now();
        Self {
            history: History::new(&request.tokens, request.prompt_len),
            deadline: request.budget.and_then(|budget| arrived.checked_add(budget)),
            // The first token has nothing before it to be predicted from.
            scored: 1,
            scores: Vec::new(),
            computed: 0,
            blocks: BlockTable::default(),
            chain: PrefixChain::new(&request.cache_salt),
            cached: 0,
            arrived,
            started: false,
            stalled_since: None,
            mixed_numerics: false,
            inexact: false,
            span,
            events,
            _ticket: ticket,
            request,
        }
    }

    /// Tokens known so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.request.tokens
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.request.prompt_len
    }

    pub(crate) fn generated(&self) -> usize {
        self.request.tokens.len() - self.request.prompt_len
    }

    /// Positions to compute before the next token, or all scores, are known.
    fn target(&self) -> usize {
        // The last token of a prompt that is only scored predicts nothing that is asked for.
        self.request.tokens.len() - usize::from(self.request.score_only())
    }

    pub(crate) fn demand(&self) -> Demand {
        Demand { target: self.target(), computed: self.computed, blocks: self.blocks.blocks().len(), idle: 0 }
    }

    /// What it will demand when it begins with what the cache has of its prefix.
    pub(crate) fn demand_after(&mut self, pool: &BlockPool, block: usize) -> Demand {
        let found = pool.matching(self.prefix(block));
        Demand { target: self.target(), computed: found.blocks * block, blocks: found.blocks, idle: found.idle }
    }

    /// Begins with what the cache has of its prefix.
    pub(crate) fn begin(&mut self, pool: &mut BlockPool, block: usize) {
        let keys = self.prefix(block).to_vec();
        self.computed = self.blocks.share(pool, &keys) * block;
        if !std::mem::replace(&mut self.started, true) {
            self.cached = self.computed.min(self.request.prompt_len);
        }
    }

    /// Keys of the blocks that it may share: all but the one with the position whose logits come next, and none where
    /// prompt positions are scored, for which there are no logits in the cache.
    fn prefix(&mut self, block: usize) -> &[PrefixKey] {
        let shareable = if self.request.prompt_logprobs.is_some() { 0 } else { (self.target() - 1) / block };
        self.chain.extend(&self.request.tokens, block);
        &self.chain.keys()[..shareable]
    }

    /// Lets others have the blocks that are full by now. What members of another numerics id took part in stays private.
    pub(crate) fn publish(&mut self, pool: &mut BlockPool, from: usize, block: usize) {
        let full = from / block..self.computed / block;
        if full.is_empty() || self.mixed_numerics {
            return;
        }
        self.chain.extend(&self.request.tokens, block);
        full.for_each(|index| pool.publish(self.blocks.blocks()[index], self.chain.keys()[index]));
    }

    /// Prompt positions that were in the cache when it first began.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// How it ends if it does not go on: it was asked for nothing more than it has.
    pub(crate) fn end(&self) -> Option<End> {
        let full = self.request.tokens.len() >= self.request.max_len;
        (full && (self.computed >= self.target() || !self.request.score_only())).then_some(End::Length)
    }

    /// What the logits at a computed position are needed for.
    pub(crate) fn ask(&self, position: usize) -> Option<Ask> {
        let next = position + 1;
        if next == self.request.tokens.len() {
            return (!self.request.score_only()).then_some(Ask::Sample);
        }
        let scored = self.request.prompt_logprobs.is_some() && next >= self.scored && next < self.request.prompt_len;
        scored.then_some(Ask::Score(next))
    }

    /// Finds what is asked of logits `[vocab]`.
    ///
    /// # Errors
    /// When the logits are no numbers or no token is allowed.
    pub(crate) fn find(&self, ask: Ask, logits: &[f32], mask: &TokenMask) -> Result<FoundToken, Error> {
        let (request, next) = (&self.request, self.next());
        let position = if let Ask::Score(position) = ask { position as u32 } else { next.position };
        sampler::check_finite(logits, position)?;
        let (token, top) = match ask {
            Ask::Score(position) => (request.tokens[position], Some(request.prompt_logprobs.unwrap_or(0))),
            Ask::Sample => (sampler::sample(&request.params, mask, logits, next)?, request.logprobs),
        };
        Ok(sampler::found(logits, token, top))
    }

    /// The position of the next token.
    fn next(&self) -> Position<'_> {
        let request = &self.request;
        let banned = if self.generated() < request.params.min_tokens { request.stop.as_slice() } else { &[] };
        Position { position: request.tokens.len() as u32, choice: request.choice, history: &self.history, banned }
    }

    fn stops_at(&self, token: u32) -> bool {
        self.request.stop.binary_search(&token).is_ok()
    }

    /// Goes on with the next token, and sends it; the way it ends, if it does now.
    fn push(&mut self, scored: ScoredToken) -> Option<End> {
        self.request.tokens.push(scored.token);
        self.history.push(scored.token);
        self.flush_scores();
        self.send(Event::Token(scored));
        self.end()
    }

    /// What a device that finds tokens itself is to find for it.
    pub(crate) fn token_ask(&self, ask: Ask) -> TokenAsk<'_> {
        let request = &self.request;
        match ask {
            Ask::Score(position) => TokenAsk {
                token: TokenSource::Known(request.tokens[position]),
                top: Some(request.prompt_logprobs.unwrap_or(0)),
            },
            Ask::Sample => {
                TokenAsk { token: TokenSource::Drawn(request.params.drawing(self.next())), top: request.logprobs }
            }
        }
    }

    /// Takes what was found for it; the way it ends, if it does now.
    pub(crate) fn take(&mut self, ask: Ask, found: FoundToken) -> Option<End> {
        let FoundToken { token, logprob, top } = found;
        let position = if let Ask::Score(position) = ask { position } else { self.request.tokens.len() };
        let top = (1..).zip(top).map(|(rank, (token, logprob))| TokenLogprob { token, logprob, rank }).collect();
        let scored = ScoredToken { token, position: position as u32, logprob, top };
        match ask {
            Ask::Score(_) => {
                self.scores.push(scored);
                self.scored = position + 1;
                None
            }
            Ask::Sample if self.stops_at(token) => Some(End::Stop(token)),
            Ask::Sample => self.push(scored),
        }
    }

    /// Sends the scores gathered since the last time.
    pub(crate) fn flush_scores(&mut self) {
        if !self.scores.is_empty() {
            let tokens = std::mem::take(&mut self.scores);
            self.send(Event::Prompt(PromptScores { tokens }));
        }
    }

    /// Its cache blocks are somebody else's now: it starts again.
    pub(crate) fn restart(&mut self) {
        self.computed = 0;
    }

    pub(crate) fn abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// When to give up on experts that do not answer.
    pub(crate) fn patience(&self, now: Instant, limit: Duration) -> Instant {
        self.deadline.unwrap_or_else(|| self.stalled_since.unwrap_or(now) + limit)
    }

    /// The error of a deadline that has passed.
    pub(crate) fn late(&self, now: Instant) -> Option<Error> {
        self.deadline.filter(|deadline| *deadline <= now).map(|deadline| {
            let budget = deadline.saturating_duration_since(self.arrived).as_millis();
            let message = format!("deadline of {budget} ms exceeded after {} generated tokens", self.generated());
            Error::new(ErrorKind::DeadlineExceeded, message)
        })
    }

    /// Sends the last event.
    pub(crate) fn finish(mut self, end: End) {
        self.flush_scores();
        let (reason, stop_token) = match end {
            End::Stop(token) => (FinishReason::Stop, Some(token)),
            End::Length => (FinishReason::Length, None),
        };
        self.send(Event::Finished(SequenceFinished {
            reason: reason.into(),
            stop_token,
            prompt_tokens: self.request.prompt_len as u32,
            cached_tokens: self.cached as u32,
            mixed_numerics: self.mixed_numerics,
        }));
    }

    /// Ends with an error.
    pub(crate) fn fail(self, error: Error) {
        tracing::debug!(parent: &self.span, request = self.request.id, %error, "sequence failed");
        // Without a receiver there is nobody left to tell.
        let _ = self.events.send(Err(error));
    }

    fn send(&self, event: Event) {
        // A receiver that is gone is noticed at the next step boundary.
        let _ = self.events.send(Ok(TokenEvent { event: Some(event), inexact: self.inexact }));
    }
}
