//! How often, and after which pauses, a client tries again.

use std::time::Duration;

use clap::Args;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// What happens when the connection is lost in the middle of an answer.
#[derive(Debug, Clone, Args)]
pub struct RetryArgs {
    /// Tries to go on with an answer whose connection was lost; counted anew after each token.
    #[arg(long, env = "CONCLAVE_RETRIES", value_name = "N", default_value = "12")]
    pub retries: u32,
}

/// The pauses before the next tries, each twice as long as the one before, up to a longest one.
#[derive(Debug, Clone)]
pub struct Pauses {
    most: u32,
    tries: u32,
}

impl Pauses {
    /// Allows `most` tries without progress.
    pub fn new(most: u32) -> Self {
        Self { most, tries: 0 }
    }

    /// The pause before the next try and the number of that try; `None` when all are spent.
    pub fn next(&mut self) -> Option<(Duration, u32)> {
        if self.tries == self.most {
            return None;
        }
        let pause = FIRST * 2u32.saturating_pow(self.tries.min(16));
        self.tries += 1;
        Some((pause.min(LONGEST), self.tries))
    }

    /// There was progress: all tries are there again.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_longest_one_and_end() {
        let mut pauses = Pauses::new(8);
        let all: Vec<u64> = std::iter::from_fn(|| pauses.next()).map(|(pause, _)| pause.as_millis() as u64).collect();
        assert_eq!(all, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        pauses.reset();
        assert_eq!(pauses.next(), Some((FIRST, 1)));
        assert_eq!(Pauses::new(0).next(), None);
    }
}
