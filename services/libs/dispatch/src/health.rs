//! Is a shard to be used? Pure: what happened and when goes in.

use std::time::Duration;

use tokio::time::Instant;

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
const BUSY: Duration = Duration::from_millis(50);
const ABSENT: Duration = Duration::from_secs(1);

/// What went wrong with a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The connection broke or could not be made.
    Lost,
    /// No answer for far longer than predicted.
    Hung,
    /// The answer does not fit the question.
    Wrong,
    /// Its queue is full.
    Busy,
    /// It leaves, or holds the cells no more.
    Leaving,
}

impl Trouble {
    /// Name in metrics and messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Hung => "hung",
            Self::Wrong => "wrong",
            Self::Busy => "busy",
            Self::Leaving => "leaving",
        }
    }

    /// Whether only an answer or a new connection shows that it is over.
    pub(crate) fn needs_probe(self) -> bool {
        matches!(self, Self::Lost | Self::Hung)
    }
}

/// The health of one shard as one dispatcher sees it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Health {
    aside: Option<(Trouble, Instant)>,
    streak: u32,
}

impl Health {
    /// Sets the shard aside; each failure without a right answer in between doubles the time.
    pub(crate) fn fail(&mut self, trouble: Trouble, now: Instant) {
        let wait = match trouble {
            Trouble::Busy => BUSY,
            Trouble::Leaving => ABSENT,
            Trouble::Lost | Trouble::Hung | Trouble::Wrong => {
                let doubled = SHORTEST * 2u32.saturating_pow(self.streak.min(10));
                self.streak = self.streak.saturating_add(1);
                doubled.min(LONGEST)
            }
        };
        self.aside = Some((trouble, now + wait));
    }

    /// A right answer came.
    pub(crate) fn succeed(&mut self) {
        *self = Self::default();
    }

    /// A new connection was made: use it again, but remember the failures until an answer comes.
    pub(crate) fn restore(&mut self) {
        self.aside = None;
    }

    /// 0 well, 1 busy, 2 set aside.
    pub(crate) fn level(&self, now: Instant) -> u8 {
        match self.aside {
            None => 0,
            Some((trouble, until)) if !trouble.needs_probe() && now >= until => 0,
            Some((Trouble::Busy, _)) => 1,
            Some(_) => 2,
        }
    }

    /// When to probe, where a probe is needed.
    pub(crate) fn probe_at(&self) -> Option<Instant> {
        self.aside.filter(|(trouble, _)| trouble.needs_probe()).map(|(_, until)| until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_shard_stays_aside_until_a_probe_and_waits_longer_each_time() {
        let now = Instant::now();
        let mut health = Health::default();
        health.fail(Trouble::Lost, now);
        assert_eq!(health.probe_at(), Some(now + SHORTEST));
        assert_eq!(health.level(now + LONGEST * 2), 2);
        health.restore();
        assert_eq!(health.level(now), 0);
        health.fail(Trouble::Hung, now);
        assert_eq!(health.probe_at(), Some(now + SHORTEST * 2));
        (0..20).for_each(|_| health.fail(Trouble::Lost, now));
        assert_eq!(health.probe_at(), Some(now + LONGEST));
        health.succeed();
        health.fail(Trouble::Lost, now);
        assert_eq!(health.probe_at(), Some(now + SHORTEST));
    }

    #[test]
    fn a_busy_shard_comes_back_by_itself() {
        let now = Instant::now();
        let mut health = Health::default();
        health.fail(Trouble::Busy, now);
        assert_eq!(health.level(now), 1);
        assert_eq!(health.level(now + BUSY), 0);
        assert_eq!(health.probe_at(), None);
        health.fail(Trouble::Wrong, now);
        assert_eq!((health.level(now), health.level(now + SHORTEST)), (2, 0));
    }
}
