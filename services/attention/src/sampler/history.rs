//! What a sequence contains so far, as the penalties count it.

use std::collections::HashMap;

/// How often each id occurs.
#[derive(Debug, Clone, Default)]
pub struct History {
    counts: HashMap<u32, Count>,
}

/// Occurrences of one id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// In prompt and output.
    pub all: u32,
    /// In the output.
    pub output: u32,
}

impl History {
    /// Counts a sequence of which the first `prompt_len` tokens are the prompt.
    pub fn new(tokens: &[u32], prompt_len: usize) -> Self {
        let mut history = Self::default();
        let (prompt, output) = tokens.split_at(prompt_len);
        prompt.iter().for_each(|token| history.counts.entry(*token).or_default().all += 1);
        output.iter().for_each(|token| history.push(*token));
        history
    }

    /// Counts a generated token.
    pub fn push(&mut self, token: u32) {
        let count = self.counts.entry(token).or_default();
        count.all += 1;
        count.output += 1;
    }

    /// The ids that occur, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Count)> {
        self.counts.iter().map(|(token, count)| (*token, *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_prompt_and_output_apart() {
        let mut history = History::new(&[5, 5, 7, 5, 9], 3);
        history.push(9);
        let mut counts: Vec<_> = history.iter().map(|(token, count)| (token, count.all, count.output)).collect();
        counts.sort_unstable();
        assert_eq!(counts, [(5, 3, 1), (7, 1, 0), (9, 2, 2)]);
    }
}
