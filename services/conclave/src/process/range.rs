//! Bounds of the numbers that flags take.

use std::ops::RangeInclusive;

use clap::builder::RangedU64ValueParser;

/// Seconds in a year: longer than any deadline is meant.
pub const YEAR: u64 = 365 * 24 * 3600;

/// A number within `range`; any other is refused with it.
pub fn range<T>(range: RangeInclusive<u64>) -> RangedU64ValueParser<T>
where
    T: TryFrom<u64> + Clone + Send + Sync + 'static,
    <T as TryFrom<u64>>::Error: std::error::Error + Send + Sync + 'static,
{
    RangedU64ValueParser::new().range(range)
}
