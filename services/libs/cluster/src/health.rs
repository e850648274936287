//! Whether a shard is sent work, from how its calls ended: used, set aside, probed. Pure: the caller passes the time in.

use std::time::{Duration, Instant};

/// When a shard is set aside, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthPolicy {
    /// Failures in a row that set a shard aside.
    pub failures: u32,
    /// First time aside; doubles with each failed probe.
    pub aside: Duration,
    /// Longest time aside.
    pub longest: Duration,
    /// After which a probe without an answer may be followed by another.
    pub probe: Duration,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        Self {
            failures: 1,
            aside: Duration::from_millis(250),
            longest: Duration::from_secs(5),
            probe: Duration::from_secs(1),
        }
    }
}

/// What a shard may be used for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Any work.
    Work,
    /// One call, to see whether it is back: announce it with [`Health::probing`].
    Probe,
    /// Nothing, unless nobody else has the cell.
    Avoid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Good { failures: u32 },
    Aside { until: Instant, wait: Duration },
    Probing { since: Instant, wait: Duration },
}

/// The health of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    policy: HealthPolicy,
    state: State,
}

impl Health {
    /// A shard that nothing bad is known of.
    pub fn new(policy: HealthPolicy) -> Self {
        Self { policy, state: State::Good { failures: 0 } }
    }

    /// What the shard may be used for at `now`.
    pub fn usable(&self, now: Instant) -> Use {
        match self.state {
            State::Good { .. } => Use::Work,
            State::Aside { until, .. } if now >= until => Use::Probe,
            State::Probing { since, .. } if now >= since + self.policy.probe => Use::Probe,
            State::Aside { .. } | State::Probing { .. } => Use::Avoid,
        }
    }

    /// Whether the shard is set aside (or being probed).
    pub fn is_aside(&self) -> bool {
        !matches!(self.state, State::Good { .. })
    }

    /// A probe goes out at `now`. Does nothing to a shard that is not set aside.
    pub fn probing(&mut self, now: Instant) {
        if let State::Aside { wait, .. } | State::Probing { wait, .. } = self.state {
            self.state = State::Probing { since: now, wait };
        }
    }

    /// A call came back. Says whether the shard was set aside before.
    pub fn succeeded(&mut self) -> bool {
        let returned = self.is_aside();
        self.state = State::Good { failures: 0 };
        returned
    }

    /// A call failed or was given up at `now`. Says whether this set the shard aside.
    pub fn failed(&mut self, now: Instant) -> bool {
        let before = self.is_aside();
        self.state = match self.state {
            State::Good { failures } if failures + 1 < self.policy.failures => State::Good { failures: failures + 1 },
            State::Good { .. } => self.aside(now, self.policy.aside),
            State::Probing { wait, .. } => self.aside(now, wait * 2),
            // A straggler from before it was set aside tells nothing new.
            aside @ State::Aside { .. } => aside,
        };
        !before && self.is_aside()
    }

    fn aside(&self, now: Instant, wait: Duration) -> State {
        let wait = wait.min(self.policy.longest);
        State::Aside { until: now + wait, wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: HealthPolicy = HealthPolicy {
        failures: 2,
        aside: Duration::from_secs(1),
        longest: Duration::from_secs(3),
        probe: Duration::from_secs(10),
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn failures_in_a_row_set_a_shard_aside() {
        let now = Instant::now();
        let mut health = Health::new(POLICY);
        assert!(!health.failed(now) && health.usable(now) == Use::Work, "one is not enough");
        assert!(!health.succeeded());
        assert!(!health.failed(now), "a success starts the count anew");
        assert!(health.failed(now), "the second in a row");
        assert_eq!(health.usable(now), Use::Avoid);
        assert!(!health.failed(now), "it is set aside once");
        assert_eq!(health.usable(now + seconds(1)), Use::Probe);
    }

    #[test]
    fn a_probe_decides() {
        let mut now = Instant::now();
        let mut health = Health::new(POLICY);
        health.failed(now);
        health.failed(now);
        for wait in [1, 2, 3, 3] {
            assert_eq!(health.usable(now + seconds(wait) - Duration::from_millis(1)), Use::Avoid);
            now += seconds(wait);
            assert_eq!(health.usable(now), Use::Probe);
            health.probing(now);
            assert_eq!(health.usable(now), Use::Avoid, "one probe at a time");
            health.failed(now);
        }
        health.probing(now);
        assert!(health.succeeded(), "it returns");
        assert_eq!(health.usable(now), Use::Work);
    }

    #[test]
    fn a_lost_probe_is_followed_by_another() {
        let now = Instant::now();
        let mut health = Health::new(POLICY);
        health.failed(now);
        health.failed(now);
        health.probing(now + seconds(1));
        assert_eq!(health.usable(now + seconds(10)), Use::Avoid);
        assert_eq!(health.usable(now + seconds(11)), Use::Probe);
        let mut good = Health::new(POLICY);
        good.probing(now);
        assert_eq!(good.usable(now), Use::Work, "a good shard needs no probe");
    }
}
