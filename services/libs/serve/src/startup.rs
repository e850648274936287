//! How far a start has come.

use prometheus::{GaugeVec, Opts, Registry};

/// The gauge `conclave_startup_progress{phase}`: 0 to 1 for each phase that has begun.
#[derive(Debug, Clone)]
pub struct Startup {
    progress: GaugeVec,
}

impl Startup {
    /// Registers the gauge; no phase has begun.
    ///
    /// # Errors
    /// When it is registered already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let opts = Opts::new("conclave_startup_progress", "How much of a phase of the start is done, 0 to 1.");
        let progress = GaugeVec::new(opts, &["phase"])?;
        registry.register(Box::new(progress.clone()))?;
        Ok(Self { progress })
    }

    /// Sets how much of `phase` is done; outside 0 to 1 is clamped.
    pub fn set(&self, phase: &str, done: f64) {
        let done = if done.is_nan() { 0.0 } else { done.clamp(0.0, 1.0) };
        self.progress.with_label_values(&[phase]).set(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_show_their_progress() {
        let registry = Registry::new();
        let startup = Startup::new(&registry).expect("a fresh registry");
        startup.set("open", 1.5);
        startup.set("load", 0.25);
        let text = crate::metrics::render(&registry);
        assert!(text.contains("conclave_startup_progress{phase=\"open\"} 1\n"), "{text}");
        assert!(text.contains("conclave_startup_progress{phase=\"load\"} 0.25\n"), "{text}");
    }
}
