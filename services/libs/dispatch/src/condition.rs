//! Is a shard to be used? What happened and when goes in; pure.

use std::time::{Duration, Instant};

use conclave_cluster::{Health, HealthPolicy, Use};

/// A full queue is given this long.
const BUSY: Duration = Duration::from_millis(50);
/// A shard that leaves or gave up cells is looked at again after this long, should the view still name it.
const LEAVING: Duration = Duration::from_secs(1);

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
}

/// One shard as one dispatcher sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Condition {
    health: Health,
    /// Not to be preferred until then, although nothing is broken.
    pause: Option<(Trouble, Instant)>,
    /// A new connection works; one call may show whether the shard does.
    trial: bool,
}

impl Default for Condition {
    fn default() -> Self {
        Self { health: Health::new(HealthPolicy::default()), pause: None, trial: false }
    }
}

impl Condition {
    /// A call failed. True where the shard has to be probed from now on.
    pub(crate) fn fail(&mut self, trouble: Trouble, now: Instant) -> bool {
        match trouble {
            Trouble::Busy => self.pause = Some((trouble, now + BUSY)),
            Trouble::Leaving => self.pause = Some((trouble, now + LEAVING)),
            Trouble::Lost | Trouble::Hung | Trouble::Wrong => {
                self.trial = false;
                self.health.failed(now);
            }
        }
        self.health.is_aside()
    }

    /// A right answer came.
    pub(crate) fn succeed(&mut self) {
        self.health.succeeded();
        (self.pause, self.trial) = (None, false);
    }

    /// Whether a probe is to go out now; if so, it counts as sent.
    pub(crate) fn probe(&mut self, now: Instant) -> bool {
        let due = self.health.usable(now) == Use::Probe;
        if due {
            self.health.probing(now);
        }
        due
    }

    /// The probe's connection works: let one call try.
    pub(crate) fn connected(&mut self) {
        self.trial = self.health.is_aside();
    }

    /// The probe found nobody.
    pub(crate) fn unreachable(&mut self, now: Instant) {
        self.health.failed(now);
    }

    /// A call goes out.
    pub(crate) fn begin(&mut self) {
        self.trial = false;
    }

    pub(crate) fn is_aside(&self) -> bool {
        self.health.is_aside()
    }

    /// 0: use it; 1: rather another; 2: only if nobody else can.
    pub(crate) fn level(&self, now: Instant) -> u8 {
        let broken = self.health.is_aside() && !self.trial;
        match self.pause.filter(|(_, until)| now < *until) {
            _ if broken => 2,
            Some((Trouble::Busy, _)) => 1,
            Some(_) => 2,
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_shard_gets_one_call_after_a_probe_has_reached_it() {
        let now = Instant::now();
        let mut shard = Condition::default();
        assert!(shard.fail(Trouble::Lost, now));
        assert_eq!(shard.level(now), 2);
        let later = now + Duration::from_secs(1);
        assert!(!shard.probe(now) && shard.probe(later));
        assert_eq!(shard.level(later), 2, "not before the connection stands");
        shard.connected();
        assert_eq!(shard.level(later), 0);
        shard.begin();
        assert_eq!(shard.level(later), 2, "one call");
        shard.succeed();
        assert_eq!((shard.level(later), shard.is_aside()), (0, false));
    }

    #[test]
    fn a_shard_that_fails_its_trial_waits_longer() {
        let mut now = Instant::now();
        let mut shard = Condition::default();
        shard.fail(Trouble::Hung, now);
        let mut waits = Vec::new();
        for _ in 0..3 {
            let begin = now;
            while !shard.probe(now) {
                now += Duration::from_millis(10);
            }
            waits.push((now - begin).as_millis());
            shard.connected();
            shard.begin();
            shard.fail(Trouble::Hung, now);
        }
        assert_eq!(waits, [250, 500, 1000]);
    }

    #[test]
    fn a_busy_shard_comes_back_by_itself() {
        let now = Instant::now();
        let mut shard = Condition::default();
        assert!(!shard.fail(Trouble::Busy, now));
        assert_eq!((shard.level(now), shard.level(now + BUSY)), (1, 0));
        assert!(!shard.fail(Trouble::Leaving, now));
        assert_eq!((shard.level(now), shard.level(now + LEAVING)), (2, 0));
    }
}
