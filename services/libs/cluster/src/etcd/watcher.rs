//! Keeps the view current: snapshot, then events from the next revision; again from a snapshot after every gap.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{EventType, WatchResponse, WatchStream};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::alarm::Alarm;
use super::store::{Snapshot, Store};
use crate::ClusterView;
use crate::roster::Roster;

/// Between two attempts to reach an etcd that is away.
const PAUSE: Duration = Duration::from_millis(500);

/// Why events stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Gap {
    /// The revisions asked for are no longer kept.
    Compacted,
    /// The stream ended or went silent.
    Lost(String),
}

pub(super) struct Watcher {
    store: Store,
    roster: Roster,
    view: watch::Sender<Arc<ClusterView>>,
    /// How often etcd is asked for a sign of life; two without one are a gap.
    pulse: Duration,
}

impl Watcher {
    pub(super) fn new(store: Store, roster: Roster, pulse: Duration) -> Self {
        let view = watch::Sender::new(Arc::new(roster.view()));
        Self { store, roster, view, pulse }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.subscribe()
    }

    /// Takes the snapshot in and says from which revision events follow it.
    pub(super) fn begin(&mut self, snapshot: Snapshot) -> i64 {
        let Snapshot { revision, members, .. } = snapshot;
        self.roster.snapshot(revision, members, Instant::now());
        self.publish();
        revision + 1
    }

    /// Watches for ever, from `revision` on.
    pub(super) async fn run(mut self, mut revision: i64, _alarm: Alarm) {
        loop {
            let gap = self.follow(revision).await;
            if let Gap::Lost(message) = &gap {
                tracing::warn!(%message, "coordinator lost; serving from the last known members");
                self.roster.unreachable();
                self.publish();
                sleep(PAUSE).await;
            }
            revision = self.resume().await;
            tracing::info!(revision, ?gap, "members read again");
        }
    }

    /// A new snapshot, as soon as there is one.
    async fn resume(&mut self) -> i64 {
        loop {
            match self.store.snapshot().await {
                Ok(snapshot) => return self.begin(snapshot),
                Err(error) => tracing::debug!(%error, "coordinator still away"),
            }
            sleep(PAUSE).await;
        }
    }

    /// Follows events until they stop.
    pub(super) async fn follow(&mut self, revision: i64) -> Gap {
        let mut stream = match self.store.watch(revision).await {
            Ok(stream) => stream,
            Err(error) => return Gap::Lost(error.to_string()),
        };
        let mut pulse = interval(self.pulse);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unanswered = 0;
        loop {
            let gap = tokio::select! {
                message = stream.message() => {
                    unanswered = 0;
                    self.take(message)
                }
                _ = pulse.tick() => {
                    unanswered += 1;
                    self.pulse(&mut stream, unanswered).await
                }
            };
            if let Some(gap) = gap {
                return gap;
            }
        }
    }

    fn take(&mut self, message: Result<Option<WatchResponse>, etcd_client::Error>) -> Option<Gap> {
        match message {
            Err(error) => Some(Gap::Lost(error.to_string())),
            Ok(None) => Some(Gap::Lost("the stream of events ended".to_owned())),
            Ok(Some(response)) if response.compact_revision() > 0 => Some(Gap::Compacted),
            Ok(Some(response)) if response.canceled() => Some(Gap::Lost(response.cancel_reason().to_owned())),
            Ok(Some(response)) => {
                self.apply(&response);
                None
            }
        }
    }

    fn apply(&mut self, response: &WatchResponse) {
        for event in response.events() {
            let Some(record) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => {
                    if let Some(member) = self.store.decode(record) {
                        self.roster.put(record.mod_revision(), member);
                    }
                }
                EventType::Delete => {
                    if let Some((role, instance)) = self.store.keys.parse(record.key()) {
                        self.roster.delete(record.mod_revision(), role, instance, Instant::now());
                    }
                }
            }
        }
        if !response.events().is_empty() {
            self.publish();
        }
    }

    /// Asks for a sign of life; a connection to a machine that hangs looks open for ever otherwise.
    async fn pulse(&mut self, stream: &mut WatchStream, unanswered: u32) -> Option<Gap> {
        if unanswered > 2 {
            return Some(Gap::Lost(format!("no sign of life for {:?}", self.pulse * 2)));
        }
        if self.roster.expire(Instant::now()) {
            self.publish();
        }
        stream.request_progress().await.err().map(|error| Gap::Lost(error.to_string()))
    }

    fn publish(&self) {
        let view = self.roster.view();
        self.view.send_if_modified(|current| {
            let changed = **current != view;
            if changed {
                *current = Arc::new(view);
            }
            changed
        });
    }
}
