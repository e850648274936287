//! What an operator says about the cells of an expert process.

use std::fmt;
use std::str::FromStr;

use crate::ClusterError;

/// Cells as asked for: `0-3,5` (groups), `0-3@1` (groups of one layer span), `1/4` (a quarter), `auto`, `auto:2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CellChoice {
    /// These and no others.
    Listed(Vec<GroupRange>),
    /// The `index`-th (from 1) of `of` contiguous parts of all cells, as even as they can be.
    Shard { index: u32, of: u32 },
    /// What the cluster needs most: so many cells, or as many as fit.
    Auto(Option<u32>),
}

/// Groups `first..=last`, of every layer span or of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupRange {
    /// First group.
    pub first: u32,
    /// Last group, inclusive.
    pub last: u32,
    /// One layer span, or all of them.
    pub span: Option<u32>,
}

impl FromStr for CellChoice {
    type Err = ClusterError;

    fn from_str(text: &str) -> Result<Self, ClusterError> {
        let text = text.trim();
        if text == "auto" {
            return Ok(Self::Auto(None));
        }
        if let Some(count) = text.strip_prefix("auto:") {
            return match number(text, count)? {
                0 => Err(wrong(text, "at least one cell")),
                count => Ok(Self::Auto(Some(count))),
            };
        }
        match text.split_once('/') {
            Some((index, of)) => shard(text, index, of),
            None => text.split(',').map(|part| range(text, part)).collect::<Result<_, _>>().map(Self::Listed),
        }
    }
}

fn shard(text: &str, index: &str, of: &str) -> Result<CellChoice, ClusterError> {
    let (index, of) = (number(text, index)?, number(text, of)?);
    if index == 0 || index > of {
        return Err(wrong(text, "shards counted from 1, such as 1/4 to 4/4"));
    }
    Ok(CellChoice::Shard { index, of })
}

fn range(text: &str, part: &str) -> Result<GroupRange, ClusterError> {
    let (groups, span) = match part.split_once('@') {
        Some((groups, span)) => (groups, Some(number(text, span)?)),
        None => (part, None),
    };
    let (first, last) = groups.split_once('-').unwrap_or((groups, groups));
    let (first, last) = (number(text, first)?, number(text, last)?);
    if first > last {
        return Err(wrong(text, "ranges that ascend"));
    }
    Ok(GroupRange { first, last, span })
}

fn number(text: &str, part: &str) -> Result<u32, ClusterError> {
    let part = part.trim();
    // Nothing but digits: the parser of integers takes a sign, too.
    let digits = !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
    part.parse().ok().filter(|_| digits).ok_or_else(|| wrong(text, "0-3,5 or 1/4 or auto or auto:2"))
}

fn wrong(text: &str, expected: &str) -> ClusterError {
    ClusterError::Placement(format!("cells {text:?}: expected {expected}"))
}

impl fmt::Display for GroupRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first.fmt(f)?;
        if self.last != self.first {
            write!(f, "-{}", self.last)?;
        }
        self.span.map_or(Ok(()), |span| write!(f, "@{span}"))
    }
}

impl fmt::Display for CellChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto(None) => f.write_str("auto"),
            Self::Auto(Some(count)) => write!(f, "auto:{count}"),
            Self::Shard { index, of } => write!(f, "{index}/{of}"),
            Self::Listed(ranges) => {
                for (i, range) in ranges.iter().enumerate() {
                    write!(f, "{}{range}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_four_forms_are_read() {
        let listed = |first, last, span| GroupRange { first, last, span };
        for (text, choice) in [
            ("auto", CellChoice::Auto(None)),
            ("auto:2", CellChoice::Auto(Some(2))),
            ("1/4", CellChoice::Shard { index: 1, of: 4 }),
            ("0-3,5", CellChoice::Listed(vec![listed(0, 3, None), listed(5, 5, None)])),
            ("7@1", CellChoice::Listed(vec![listed(7, 7, Some(1))])),
        ] {
            assert_eq!(text.parse::<CellChoice>().expect(text), choice);
            assert_eq!(choice.to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused_by_its_text() {
        for text in
            ["", "x", "auto:", "auto:0", "auto:-1", "0/4", "5/4", "1/0", "/", "3-1", "1,,2", "1-", "+1", "99999999999"]
        {
            let error = text.parse::<CellChoice>().expect_err(text).to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("expected"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[-0-9,@/:a-z ]{0,12}") {
            if let Ok(choice) = text.parse::<CellChoice>() {
                prop_assert_eq!(choice.to_string().parse::<CellChoice>().expect("what is written is read"), choice);
            }
        }
    }
}
