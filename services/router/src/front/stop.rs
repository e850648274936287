//! Stop strings over a text that comes in pieces.

/// Passes text through until one of the stop strings stands in it; withholds what may yet become one.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    held: String,
}

/// What a piece of text leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Passed {
    /// Text that no stop string can claim any more.
    Text(String),
    /// The end: the text up to the match (with it where asked), and the stop string.
    Stopped { text: String, stop: String },
}

impl StopMatcher {
    /// Looks for any of `stops` (none of them empty); `include` keeps the match in the text.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Takes the next piece. The match is the one that ends first, and of those the one that begins first, so that it
    /// does not depend on how the text was cut.
    pub(crate) fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        if let Some((end, start, stop)) = self.first_match() {
            let stop = self.stops[stop].clone();
            self.held.truncate(if self.include { end } else { start });
            return Passed::Stopped { text: self.finish(), stop };
        }
        let free = self.held.len() - self.forming();
        Passed::Text(self.held.drain(..free).collect())
    }

    /// Ends the text: what was withheld is text after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// End, start and index of the match.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        let matches = self.stops.iter().enumerate();
        matches.filter_map(|(i, stop)| self.held.find(stop).map(|start| (start + stop.len(), start, i))).min()
    }

    /// Bytes at the end that are a proper prefix of a stop string.
    fn forming(&self) -> usize {
        let held = self.held.as_bytes();
        let prefix = |stop: &String| (1..stop.len()).rev().find(|&n| held.ends_with(&stop.as_bytes()[..n]));
        self.stops.iter().filter_map(prefix).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut out = Vec::new();
        for piece in pieces {
            match matcher.push(piece) {
                Passed::Text(text) => out.push(text),
                Passed::Stopped { text, stop } => {
                    out.push(text);
                    return (out, Some(stop));
                }
            }
        }
        out.push(matcher.finish());
        (out, None)
    }

    #[test]
    fn withholds_a_forming_stop_string() {
        let (out, stop) = run(&["END"], false, &["abE", "N", "D tail"]);
        assert_eq!(out, ["ab", "", ""]);
        assert_eq!(stop.as_deref(), Some("END"));
    }

    #[test]
    fn gives_back_what_did_not_become_one() {
        let (out, stop) = run(&["END"], false, &["abE", "N", "x", "EN"]);
        assert_eq!(out, ["ab", "", "ENx", "", "EN"]);
        assert_eq!(stop, None);
    }

    #[test]
    fn the_match_that_ends_first_wins() {
        assert_eq!(run(&["abcd", "b"], false, &["xabcd"]).1.as_deref(), Some("b"));
        assert_eq!(run(&["b", "ab"], false, &["xab"]), (vec!["x".to_owned()], Some("ab".to_owned())));
    }

    #[test]
    fn keeps_the_stop_string_where_asked() {
        assert_eq!(run(&["\n\n"], true, &["a\n", "\nb"]).0, ["a", "\n\n"]);
    }

    #[test]
    fn overlapping_beginnings_are_kept() {
        assert_eq!(run(&["aab"], false, &["a", "a", "a", "b"]).0.concat(), "a");
    }

    proptest! {
        #[test]
        fn cutting_does_not_matter(text in "[abc你]{0,20}", stops in prop::collection::vec("[abc你]{1,3}", 0..3), include: bool) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            let (one_by_one, first) = run(&stops, include, &characters);
            let (at_once, second) = run(&stops, include, &[&text]);
            prop_assert_eq!(one_by_one.concat(), at_once.concat());
            prop_assert_eq!(&first, &second);
            if !include {
                prop_assert!(stops.iter().all(|stop| !at_once.concat().contains(stop)));
            }
            prop_assert_eq!(first.is_none(), stops.iter().all(|stop| !text.contains(stop)));
        }
    }
}
