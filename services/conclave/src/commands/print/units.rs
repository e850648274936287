//! Numbers as people read them.

/// With a comma every three digits: `15,706,484,224`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three digits and a decimal unit: `31.4 GB`.
pub fn bytes(number: u64) -> String {
    scaled(number, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

/// Three digits and the usual letter: `15.7 B` for 15.7 billion.
pub fn short(number: u64) -> String {
    scaled(number, &["", "K", "M", "B", "T", "P", "E"]).trim_end().to_owned()
}

fn scaled(number: u64, units: &[&str]) -> String {
    let mut value = number as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match value {
        _ if unit == 0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", units[unit])
}

/// A part of a whole, with one decimal: `12.5 %`; a dash where there is no whole.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    format!("{:.1} %", 100.0 * part as f64 / whole as f64)
}

/// Time in its largest unit: `12s`, `3m`, `5h`, `9d`.
pub fn age(milliseconds: u64) -> String {
    match milliseconds / 1000 {
        seconds if seconds < 60 => format!("{seconds}s"),
        seconds if seconds < 3600 => format!("{}m", seconds / 60),
        seconds if seconds < 86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// A bar of at most `width` characters, to an eighth of one.
pub fn bar(part: u64, whole: u64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    if whole == 0 {
        return String::new();
    }
    let eighths = (part.min(whole) as f64 / whole as f64 * (8 * width) as f64).round() as usize;
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        assert_eq!([0, 999, 1000, 15_706_484_224].map(count), ["0", "999", "1,000", "15,706,484,224"]);
    }

    #[test]
    fn three_digits_are_kept_and_never_four() {
        let cases = [0, 999, 1000, 9_994, 9_996, 99_949, 999_499, 999_500, 31_412_968_448];
        let shown = ["0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "99.9 kB", "999 kB", "1.00 MB", "31.4 GB"];
        assert_eq!(cases.map(bytes), shown);
        assert_eq!(bytes(u64::MAX), "18.4 EB");
        assert_eq!([7, 15_706_484_224].map(short), ["7", "15.7 B"]);
    }

    #[test]
    fn shares_and_ages() {
        assert_eq!((percent(1, 8), percent(3, 3), percent(0, 0)), ("12.5 %".into(), "100.0 %".into(), "-".into()));
        let ages = [900, 59_999, 60_000, 3_599_000, 3_600_000, 86_400_000].map(age);
        assert_eq!(ages, ["0s", "59s", "1m", "59m", "1h", "1d"]);
    }

    #[test]
    fn bars_fill_their_width_at_the_most() {
        assert_eq!((bar(1, 1, 4), bar(9, 1, 4), bar(0, 5, 4)), ("████".into(), "████".into(), String::new()));
        assert_eq!((bar(1, 2, 3), bar(1, 0, 3)), ("█▌".into(), String::new()));
    }
}
