//! A run as people read it.

use super::{
    limits::Rates,
    profile::Profile,
    report::{Figure, Report},
    stats::Summary,
};

/// The machine, the model, the figures, and where the time of a step went.
pub fn render(report: &Report, baseline: Option<&[Figure]>) -> String {
    let mut text = head(report);
    text += "\n";
    text += &figures(&report.figures, baseline);
    for profile in &report.profiles {
        text += "\n";
        text += &self::profile(profile);
    }
    text
}

fn head(report: &Report) -> String {
    let Report { machine, limits, model, .. } = report;
    let load = machine.load_before.zip(machine.load_after).map_or_else(String::new, |(before, after)| {
        format!(", load {before:.1} before the run and {after:.1} at its end")
    });
    let mut lines = vec![
        format!("conclave {} ({}), {}, {}", report.version, report.commit, report.numerics, report.target),
        format!("{}, {} cores, {:.1} GiB{load}", machine.processor, machine.cores, gibibytes(machine.memory_bytes)),
        format!(
            "limits ({}): reads {} GB/s, multiply-adds {} GFLOP/s",
            limits.of,
            spread(&limits.samples, |rates| rates.read),
            spread(&limits.samples, |rates| rates.flops)
        ),
    ];
    let sizes = model.weight_bytes.zip(model.bytes_per_token).map_or_else(String::new, |(all, token)| {
        format!(": {:.3} GB of weights, {:.3} GB of them read for a token", all / 1e9, token / 1e9)
    });
    lines.push(format!("{}{sizes}", model.name));
    lines.push(String::new());
    lines.join("\n")
}

/// The least, the median and the most of a rate, in 10⁹.
fn spread(samples: &[Rates], rate: impl Fn(&Rates) -> f64) -> String {
    let samples: Vec<f64> = samples.iter().map(|rates| rate(rates) / 1e9).collect();
    Summary::of(&samples).map_or_else(String::new, |Summary { min, median, max }| {
        format!("{} / {} / {}", number(min), number(median), number(max))
    })
}

/// One line a figure.
fn figures(figures: &[Figure], baseline: Option<&[Figure]>) -> String {
    let mut rows = vec![["", "unit", "min", "median", "max", "limit", "of limit"].map(str::to_owned).to_vec()];
    if baseline.is_some() {
        rows[0].push("of baseline".to_owned());
    }
    for figure in figures {
        let mut row = vec![figure.name.clone(), figure.unit.name().to_owned()];
        match (Summary::of(&figure.samples), &figure.note) {
            (Some(Summary { min, median, max }), _) => row.extend([min, median, max].map(number)),
            (None, note) => row.push(format!("- ({})", note.as_deref().unwrap_or("not measured"))),
        }
        if !figure.samples.is_empty() {
            let (limit, share) = figure.of_limit().unzip();
            row.push(limit.map_or_else(String::new, number));
            row.push(share.map_or_else(String::new, percent));
            row.push(baseline.and_then(|earlier| figure.ratio(earlier)).map_or_else(String::new, ratio));
        }
        rows.push(row);
    }
    aligned(&rows)
}

/// Where the time of a step went.
fn profile(profile: &Profile) -> String {
    let mut rows =
        vec![["operation", "calls", "MB", "ms", "of time", "limit ms", "of limit"].map(str::to_owned).to_vec()];
    for line in &profile.lines {
        rows.push(vec![
            line.operation.clone(),
            line.calls.to_string(),
            number(line.bytes / 1e6),
            number(line.seconds * 1e3),
            percent(line.seconds / profile.seconds),
        ]);
        if line.limit > 0.0
            && let Some(row) = rows.last_mut()
        {
            row.extend([number(line.limit * 1e3), percent(line.limit / line.seconds)]);
        }
    }
    let rest = profile.rest();
    rows.push(["everything else", "", ""].map(str::to_owned).to_vec());
    if let Some(row) = rows.last_mut() {
        row.extend([number(rest * 1e3), percent(rest / profile.seconds)]);
    }
    let total: f64 = profile.lines.iter().map(|line| line.limit).sum();
    format!(
        "{}: {} ms, of which the limits explain {} ms\n{}",
        profile.name,
        number(profile.seconds * 1e3),
        number(total * 1e3),
        aligned(&rows)
    )
}

/// The first column to the left, the others to the right; a last cell in brackets reaches over the columns behind it.
fn aligned(rows: &[Vec<String>]) -> String {
    let is_note = |cell: &String| cell.starts_with("- (");
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).filter(|cell| !is_note(cell));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            match column {
                0 => line += &format!("{cell:<width$}"),
                _ if is_note(cell) => line += &format!("  {cell}"),
                _ => line += &format!("  {cell:>width$}"),
            }
        }
        line.trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Three digits that count, and no more than that many behind the point.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn ratio(ratio: f64) -> String {
    format!("{ratio:.2} x")
}

fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

#[cfg(test)]
mod tests {
    use super::super::{profile::Line, report::Unit};
    use super::*;

    #[test]
    fn figures_stand_in_columns() {
        let measured = [
            Figure { limits: vec![20.0; 3], ..Figure::new("decode", Unit::TokensPerSecond, vec![9.0, 10.0, 12.5]) },
            Figure::skipped("prefill 4096", Unit::TokensPerSecond, "the context is 2048"),
            Figure::new("ready", Unit::Seconds, vec![0.1234]),
        ];
        let earlier = [Figure::new("decode", Unit::TokensPerSecond, vec![12.5])];
        let expected = "\
\u{20}              unit    min  median    max  limit  of limit  of baseline
decode        tok/s   9.00    10.0   12.5   20.0      50 %       0.80 x
prefill 4096  tok/s  - (the context is 2048)
ready             s  0.123   0.123  0.123
";
        assert_eq!(figures(&measured, Some(&earlier)), expected);
        assert!(!figures(&measured, None).contains("baseline"));
    }

    #[test]
    fn numbers_have_three_digits() {
        let found: Vec<String> = [0.0, 0.0123, 1.2345, 99.96, 123.4, 12345.6].into_iter().map(number).collect();
        assert_eq!(found, ["0.000", "0.012", "1.23", "100.0", "123", "12346"]);
    }

    #[test]
    fn a_profile_adds_up_to_its_step() {
        let line = |operation: &str, seconds, limit| Line {
            operation: operation.into(),
            calls: 5,
            bytes: 5e6,
            flops: 0.0,
            seconds,
            limit,
        };
        let lines = vec![line("grouped_ffn 64x32", 0.006, 0.003), line("rms_norm", 0.001, 0.0)];
        let text = profile(&Profile { name: "decode".into(), seconds: 0.010, lines });
        assert!(text.starts_with("decode: 10.0 ms, of which the limits explain 3.00 ms\n"), "{text}");
        assert!(text.contains("grouped_ffn 64x32      5  5.00  6.00     60 %      3.00      50 %\n"), "{text}");
        assert!(text.contains("everything else                 3.00     30 %\n"), "{text}");
    }
}
