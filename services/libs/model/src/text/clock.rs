//! Dates in the format of `strftime`, in UTC, for chat templates that name the day.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// The first day of 1970 was a Thursday.
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A day of the Gregorian calendar.
struct Date {
    year: u64,
    /// 0..12
    month: usize,
    /// 1..=31
    day: u64,
    /// 1..=366
    day_of_year: u64,
}

/// Writes the time `seconds` after 1970 by `format`.
///
/// # Errors
/// Names a directive that is not known.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let (days, second) = (seconds / 86400, seconds % 86400);
    let date = date(days);
    let (month, weekday) = (MONTHS[date.month], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&date.year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", date.year % 100)),
            Some('m') => out.push_str(&format!("{:02}", date.month + 1)),
            Some('d') => out.push_str(&format!("{:02}", date.day)),
            Some('j') => out.push_str(&format!("{:03}", date.day_of_year)),
            Some('B') => out.push_str(month),
            Some('b') => out.push_str(&month[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('%') => out.push('%'),
            other => return Err(format!("strftime_now: directive %{} is not known", other.unwrap_or(' '))),
        }
    }
    Ok(out)
}

/// The date `days` after the first of 1970.
fn date(days: u64) -> Date {
    let mut rest = days % CYCLE;
    let mut year = 1970 + 400 * (days / CYCLE);
    while rest >= year_days(year) {
        rest -= year_days(year);
        year += 1;
    }
    let day_of_year = rest + 1;
    let lengths = [31, year_days(year) - 337, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    Date { year, month, day: rest + 1, day_of_year }
}

/// Days of 400 years, after which the calendar repeats.
const CYCLE: u64 = 146_097;

fn year_days(year: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    365 + u64::from(leap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days() {
        let cases = [
            (0, "1970-01-01 Thursday 001 00:00:00"),
            (951_827_696, "2000-02-29 Tuesday 060 12:34:56"),
            (1_735_689_599, "2024-12-31 Tuesday 366 23:59:59"),
            (4_107_542_400, "2100-03-01 Monday 060 00:00:00"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime("%Y-%m-%d %A %j %H:%M:%S", seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%d %b %y, %a, %B %%", 0).unwrap(), "01 Jan 70, Thu, January %");
    }

    #[test]
    fn every_time_has_a_date() {
        for seconds in [u64::MAX, u64::MAX / 2, 1 << 40] {
            assert!(strftime("%Y %B %d", seconds).is_ok());
        }
    }

    #[test]
    fn unknown_directives_are_named() {
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("100%", 0).is_err());
    }
}
