//! How fast an answer came.

use std::time::{Duration, Instant};

/// When the tokens of one answer came.
#[derive(Debug, Clone)]
pub struct Speed {
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u64,
}

impl Speed {
    /// The request goes out now.
    pub fn start(now: Instant) -> Self {
        Self { begun: now, first: None, last: now, tokens: 0 }
    }

    /// Tokens came.
    pub fn came(&mut self, tokens: usize, now: Instant) {
        if tokens > 0 {
            self.first.get_or_insert(now);
            self.last = now;
            self.tokens += tokens as u64;
        }
    }

    /// The server's own count of tokens: it is right also where several come in one piece.
    pub fn counted(&mut self, tokens: u64) {
        self.tokens = tokens;
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// For people: tokens, tokens a second after the first, and how long the first one took.
    pub fn summary(&self) -> String {
        let mut parts = vec![match self.tokens {
            1 => "1 token".to_owned(),
            tokens => format!("{tokens} tokens"),
        }];
        if let Some(first) = self.first {
            parts.extend(per_second(self.tokens.saturating_sub(1), self.last - first));
            parts.push(format!("first after {:.2} s", (first - self.begun).as_secs_f64()));
        }
        parts.join(" · ")
    }
}

fn per_second(tokens: u64, time: Duration) -> Option<String> {
    let rate = tokens as f64 / time.as_secs_f64();
    (tokens > 0 && rate.is_finite()).then(|| format!("{rate:.1} tokens/s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_counts_as_wait_and_the_others_as_rate() {
        let begun = Instant::now();
        let after = |ms| begun + Duration::from_millis(ms);
        let mut speed = Speed::start(begun);
        assert_eq!(speed.summary(), "0 tokens");
        speed.came(1, after(250));
        assert_eq!(speed.summary(), "1 token · first after 0.25 s");
        speed.came(0, after(400));
        speed.came(4, after(750));
        assert_eq!(speed.summary(), "5 tokens · 8.0 tokens/s · first after 0.25 s");
        speed.counted(11);
        assert_eq!(speed.summary(), "11 tokens · 20.0 tokens/s · first after 0.25 s");
    }
}
