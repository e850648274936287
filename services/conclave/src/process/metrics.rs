//! One metrics page for several services of one process.

use conclave_serve::metrics;
use prometheus::{
    Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// A process's registry with its own figures.
///
/// # Errors
/// When the figures cannot be registered.
pub fn registry(service: &str) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    metrics::register_process(&registry, service)?;
    Ok(registry)
}

/// One registry a shard, its name on every metric; they are shown together with those of `registry`.
///
/// # Errors
/// When the name is no label value or this was called before.
pub fn shard_registries(registry: &Registry, shards: &[String]) -> prometheus::Result<Vec<Registry>> {
    let labelled = |shard: &String| Registry::new_custom(None, Some([("shard".to_owned(), shard.clone())].into()));
    let parts = shards.iter().map(labelled).collect::<prometheus::Result<Vec<_>>>()?;
    registry.register(Box::new(Parts(parts.clone())))?;
    Ok(parts)
}

/// Registries as one collector: families of one name are joined when the whole is gathered.
struct Parts(Vec<Registry>);

impl Collector for Parts {
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.iter().flat_map(Registry::gather).collect()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::IntCounter;

    use super::*;

    #[test]
    fn shards_share_a_family_and_keep_their_names() {
        let whole = registry("test").unwrap();
        let parts = shard_registries(&whole, &["a".into(), "b".into()]).unwrap();
        for (i, part) in parts.iter().enumerate() {
            let counter = IntCounter::new("conclave_test_total", "A test.").unwrap();
            part.register(Box::new(counter.clone())).unwrap();
            counter.inc_by(i as u64 + 1);
        }
        let text = metrics::render(&whole);
        assert!(text.contains("conclave_test_total{shard=\"a\"} 1"), "{text}");
        assert!(text.contains("conclave_test_total{shard=\"b\"} 2"), "{text}");
        assert_eq!(text.matches("# TYPE conclave_test_total").count(), 1, "{text}");
    }
}
