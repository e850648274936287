//! What a run found, as it is written to a file and compared with an earlier one.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{
    limits::{Rates, Work},
    machine::{Limits, Machine},
    profile::Profile,
    stats::Summary,
};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// More is better.
    #[serde(rename = "tok/s")]
    TokensPerSecond,
    /// Less is better, as for all below but the last.
    #[serde(rename = "s")]
    Seconds,
    /// Of a second.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Of a second.
    #[serde(rename = "µs")]
    Microseconds,
    /// Of memory.
    #[serde(rename = "GiB")]
    Gibibytes,
    /// A ratio.
    #[serde(rename = "x")]
    Times,
}

impl Unit {
    /// As it stands in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::TokensPerSecond => "tok/s",
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
            Self::Microseconds => "µs",
            Self::Gibibytes => "GiB",
            Self::Times => "x",
        }
    }

    /// The figure of `tokens` tokens within some seconds; `None` for what is no matter of time.
    fn of(self, seconds: f64, tokens: f64) -> Option<f64> {
        Some(match self {
            Self::TokensPerSecond => tokens / seconds,
            Self::Seconds => seconds,
            Self::Milliseconds => seconds * 1e3,
            Self::Microseconds => seconds * 1e6,
            Self::Gibibytes | Self::Times => return None,
        })
    }
}

/// What a figure stands for at least: work, and the tokens that come of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AtLeast {
    /// To be done.
    pub work: Work,
    /// That it brings.
    pub tokens: f64,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured; the same in every run.
    pub name: String,
    /// What the samples count.
    pub unit: Unit,
    /// One a repetition; none where the measurement was left out or not done in time.
    pub samples: Vec<f64>,
    /// The best that the machine allowed at the time of each sample; none where it is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<f64>,
    /// Why there are no samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// What the limits follow from.
    #[serde(skip)]
    pub at_least: Option<AtLeast>,
}

/// Why something was not measured that takes longer than a measurement may.
pub fn late(limit: Duration) -> String {
    format!("not done within {} s, see --limit", limit.as_secs())
}

impl Figure {
    /// Without a limit.
    pub fn new(name: impl Into<String>, unit: Unit, samples: Vec<f64>) -> Self {
        Self { name: name.into(), unit, samples, limits: Vec::new(), note: None, at_least: None }
    }

    /// One that was not measured.
    pub fn skipped(name: impl Into<String>, unit: Unit, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..Self::new(name, unit, Vec::new()) }
    }

    /// Sets the limits of the samples on a machine with these rates, where the work behind the figure is known.
    pub fn limit_by(&mut self, rates: impl IntoIterator<Item = Rates>) {
        let Some(least) = self.at_least else { return };
        let limits = rates.into_iter().map(|rates| self.unit.of(rates.seconds(least.work), least.tokens));
        self.limits = limits.collect::<Option<_>>().unwrap_or_default();
    }

    /// The limit, and what part of it was reached, at 1 it could not be better: medians over the samples.
    pub fn of_limit(&self) -> Option<(f64, f64)> {
        let share = |(sample, limit): (&f64, &f64)| match self.unit {
            Unit::TokensPerSecond => sample / limit,
            _ => limit / sample,
        };
        let shares: Vec<f64> = self.samples.iter().zip(&self.limits).map(share).collect();
        Some((Summary::of(&self.limits)?.median, Summary::of(&shares)?.median))
    }

    /// The median as a multiple of the same figure's in an earlier run.
    pub fn ratio(&self, baseline: &[Self]) -> Option<f64> {
        let earlier = baseline.iter().find(|figure| figure.name == self.name && figure.unit == self.unit)?;
        Some(Summary::of(&self.samples)?.median / Summary::of(&earlier.samples)?.median)
    }
}

/// Everything that a run found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of Conclave.
    pub version: &'static str,
    /// Of the source that the binary was built from.
    pub commit: &'static str,
    /// What decides the bits of the served model.
    pub numerics: String,
    /// Where it ran.
    pub machine: Machine,
    /// What was measured: this process, or the URL of a server.
    pub target: String,
    /// What was served.
    pub model: Model,
    /// What the machine can do at most.
    pub limits: Limits,
    /// In the order of the table.
    pub figures: Vec<Figure>,
    /// Peak memory of each process.
    pub processes: Vec<Process>,
    /// Where the time of a step went; only with `--profile`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<Profile>,
}

/// The served model.
#[derive(Debug, Clone, Serialize)]
pub struct Model {
    /// As clients ask for it.
    pub name: String,
    /// Of its checkpoint.
    pub fingerprint: String,
    /// Bytes of all weights as the device keeps them; `None` where the checkpoint is not at hand.
    pub weight_bytes: Option<f64>,
    /// Bytes that one sequence reads a token, its latents not counted.
    pub bytes_per_token: Option<f64>,
}

/// One process that took part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Most memory that it had resident.
    pub peak_bytes: u64,
}

impl Report {
    /// Writes it as JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("--json: write {}", path.display()))
    }
}

/// The figures of an earlier run.
///
/// # Errors
/// When the file cannot be read or is none of `--json`.
pub fn read_figures(path: &Path) -> Result<Vec<Figure>> {
    #[derive(Deserialize)]
    struct Earlier {
        figures: Vec<Figure>,
    }
    let text = fs::read_to_string(path).with_context(|| format!("--baseline: read {}", path.display()))?;
    let earlier: Earlier =
        serde_json::from_str(&text).with_context(|| format!("--baseline: {} is no file of --json", path.display()))?;
    if earlier.figures.is_empty() {
        bail!("--baseline: {}: found no figures", path.display());
    }
    Ok(earlier.figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_the_limit_and_ratios_look_the_right_way() {
        let samples = vec![40.0, 50.0, 60.0];
        let rate = Figure { limits: vec![400.0, 200.0, 100.0], ..Figure::new("a", Unit::TokensPerSecond, samples) };
        let time = Figure { limits: vec![5.0], ..Figure::new("b", Unit::Milliseconds, vec![20.0]) };
        assert_eq!((rate.of_limit(), time.of_limit()), (Some((200.0, 0.25)), Some((5.0, 0.25))));
        let earlier =
            [Figure::new("a", Unit::TokensPerSecond, vec![100.0]), Figure::new("b", Unit::Seconds, vec![1.0])];
        assert_eq!((rate.ratio(&earlier), time.ratio(&earlier)), (Some(0.5), None), "another unit is another figure");
        assert_eq!(Figure::skipped("a", Unit::Seconds, "why").of_limit(), None);
    }

    #[test]
    fn a_limit_follows_from_the_work() {
        let rates = Rates { read: 100.0, flops: 1.0 };
        let at_least = Some(AtLeast { work: Work { bytes: 50.0, flops: 0.25 }, tokens: 8.0 });
        let limit = |unit| {
            let mut figure = Figure { at_least, ..Figure::new("a", unit, vec![1.0]) };
            figure.limit_by([rates]);
            figure.limits
        };
        assert_eq!((limit(Unit::TokensPerSecond), limit(Unit::Milliseconds)), (vec![16.0], vec![500.0]));
        assert!(limit(Unit::Gibibytes).is_empty());
    }

    #[test]
    fn figures_come_back_from_their_file() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("run.json");
        let figures = vec![
            Figure { limits: vec![3.5, 3.0], ..Figure::new("decode", Unit::TokensPerSecond, vec![1.0, 2.0]) },
            Figure::skipped("prefill", Unit::Microseconds, "too long"),
        ];
        let written = serde_json::json!({ "figures": figures, "version": "1" });
        fs::write(&path, written.to_string()).unwrap();
        assert_eq!(read_figures(&path).unwrap(), figures);
        fs::write(&path, "{}").unwrap();
        assert!(read_figures(&path).unwrap_err().to_string().contains("is no file of --json"));
        assert!(read_figures(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
