//! Attention replicas that say what they are told.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use conclave_cluster::Member;
use conclave_proto::v1::{
    AttentionStatus, FinishReason, PromptScores, ScoredToken, SequenceFinished, SequenceRequest, TokenEvent,
    TokenLogprob, token_event::Event,
};
use conclave_router::{AttentionConnector, AttentionLink};
use conclave_serve::{Error, ErrorKind};
use futures::{StreamExt, stream, stream::BoxStream};

use super::codec::{ByteCodec, EOS};

/// What a replica does with every sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct Script {
    /// The whole output: a sequence that comes with part of it gets the rest.
    output: Vec<u32>,
    /// Sequences are refused so, this many times.
    refuse: Option<(ErrorKind, usize)>,
    /// The stream breaks after this many tokens with this error, this many times.
    break_after: Option<(usize, ErrorKind, usize)>,
    /// After the output nothing comes any more.
    hangs: bool,
    /// Positions are this much too high.
    skew: u32,
}

impl Script {
    pub(crate) fn says(text: &str) -> Self {
        Self { output: ByteCodec::ids(text), ..Self::default() }
    }

    pub(crate) fn refuses(mut self, kind: ErrorKind, times: usize) -> Self {
        self.refuse = Some((kind, times));
        self
    }

    pub(crate) fn breaks_after(mut self, tokens: usize, kind: ErrorKind, times: usize) -> Self {
        self.break_after = Some((tokens, kind, times));
        self
    }

    pub(crate) fn hangs(mut self) -> Self {
        self.hangs = true;
        self
    }

    pub(crate) fn skewed(mut self, skew: u32) -> Self {
        self.skew = skew;
        self
    }

    /// The tokens and the end of a sequence.
    fn events(&self, request: &SequenceRequest) -> Vec<Event> {
        let done = request.tokens.len() - request.prompt_len as usize;
        let most = (request.max_tokens as usize).min(self.output.len());
        let scores = request.prompt_logprobs.map(|top| {
            let tokens = (1..request.prompt_len).map(|at| scored(request.tokens[at as usize], at, Some(top)));
            Event::Prompt(PromptScores { tokens: tokens.collect() })
        });
        let token = |i: usize| {
            let position = request.prompt_len + u32::try_from(i).expect("short") + self.skew;
            Event::Token(scored(self.output[i], position, request.logprobs))
        };
        let stopped = most == self.output.len() && request.stop_token_ids.contains(&EOS);
        let finished = SequenceFinished {
            reason: if stopped { FinishReason::Stop } else { FinishReason::Length }.into(),
            stop_token: stopped.then_some(EOS),
            prompt_tokens: request.prompt_len,
            cached_tokens: 3,
            mixed_numerics: false,
        };
        let last = (!self.hangs).then_some(Event::Finished(finished));
        scores.into_iter().chain((done..most.max(done)).map(token)).chain(last).collect()
    }
}

/// Logprobs that a test can foretell: minus a hundredth of the token; the next ids are the likeliest.
fn scored(token: u32, position: u32, top: Option<u32>) -> ScoredToken {
    let entry = |i: u32| TokenLogprob { token: token + i, logprob: -((token + i) as f32) / 100.0, rank: i + 1 };
    ScoredToken {
        token,
        position,
        logprob: top.map(|_| -(token as f32) / 100.0),
        top: (0..top.unwrap_or(0)).map(entry).collect(),
    }
}

/// One replica and what it has seen.
#[derive(Default)]
pub(crate) struct Replica {
    script: Script,
    pub(crate) seen: Mutex<Vec<SequenceRequest>>,
    pub(crate) broken: AtomicUsize,
    pub(crate) refused: AtomicUsize,
    /// Streams dropped before their end.
    pub(crate) cancelled: AtomicUsize,
}

/// All replicas by instance; connects to them.
pub(crate) struct Replicas(HashMap<&'static str, Arc<Replica>>);

impl Replicas {
    pub(crate) fn new(scripts: impl Iterator<Item = (&'static str, Script)>) -> Self {
        let replica = |(name, script)| (name, Arc::new(Replica { script, ..Replica::default() }));
        Self(scripts.map(replica).collect())
    }

    pub(crate) fn get(&self, name: &str) -> &Arc<Replica> {
        &self.0[name]
    }
}

#[async_trait]
impl AttentionConnector for Replicas {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn AttentionLink>, Error> {
        Ok(Arc::new(Link(self.get(&member.instance.0).clone())))
    }
}

/// A connection to a replica.
pub(crate) struct Link(pub Arc<Replica>);

impl Replica {
    pub(crate) fn new(script: Script) -> Arc<Self> {
        Arc::new(Self { script, ..Self::default() })
    }

    pub(crate) fn requests(&self) -> Vec<SequenceRequest> {
        self.seen.lock().expect("no panic").clone()
    }

    /// What any transport calls.
    pub(crate) fn run(
        self: &Arc<Self>,
        request: SequenceRequest,
    ) -> Result<BoxStream<'static, Result<TokenEvent, Error>>, Error> {
        self.seen.lock().expect("no panic").push(request.clone());
        if let Some((kind, times)) = self.script.refuse
            && self.refused.fetch_add(1, Ordering::SeqCst) < times
        {
            return Err(Error::new(kind, "refused by the script"));
        }
        let mut events: Vec<_> = self.script.events(&request).into_iter().map(Ok).collect();
        let mut ends = !self.script.hangs;
        if let Some((after, kind, times)) = self.script.break_after
            && self.broken.fetch_add(1, Ordering::SeqCst) < times
        {
            events.truncate(after);
            events.push(Err(Error::new(kind, "broken by the script")));
            ends = true;
        }
        let mut guard = Guard { replica: self.clone(), left: events.len() + usize::from(!ends) };
        let rest = if ends { stream::empty().boxed() } else { stream::pending().boxed() };
        let events = stream::iter(events).chain(rest).map(move |event| {
            // The whole guard moves in here, not one field of it.
            let guard = &mut guard;
            guard.left -= 1;
            event.map(|event| TokenEvent { event: Some(event), inexact: false })
        });
        Ok(events.boxed())
    }
}

/// Notices that a stream was dropped before its end.
struct Guard {
    replica: Arc<Replica>,
    left: usize,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.left > 0 {
            self.replica.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[async_trait]
impl AttentionLink for Link {
    async fn generate(&self, request: SequenceRequest) -> Result<BoxStream<'static, Result<TokenEvent, Error>>, Error> {
        self.0.run(request)
    }

    async fn status(&self) -> Result<AttentionStatus, Error> {
        Ok(AttentionStatus { running: 2, waiting: 5, ..AttentionStatus::default() })
    }
}
