//! Flags that several services share. Each is also an environment variable `CONCLAVE_*`.

use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Args;

use crate::same_host::SameHost;
use crate::telemetry::{LogFormat, TelemetryConfig};

/// Logs and traces.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// How log lines look.
    #[arg(long, env = "CONCLAVE_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged: a level, or directives such as `warn,conclave_router=debug`.
    #[arg(long, env = "CONCLAVE_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// OTLP/gRPC receiver of traces, http://host:port.
    #[arg(long, env = "CONCLAVE_OTLP_ENDPOINT", value_name = "URL", value_parser = endpoint)]
    pub otlp_endpoint: Option<String>,
}

impl LogArgs {
    /// The telemetry of one process.
    pub fn telemetry(&self, service: &str, instance: &str) -> TelemetryConfig {
        TelemetryConfig {
            log_format: self.log_format,
            log: self.log.clone(),
            otlp_endpoint: self.otlp_endpoint.clone(),
            service: service.to_owned(),
            instance: instance.to_owned(),
        }
    }
}

/// Membership of a cluster.
#[derive(Debug, Clone, Args)]
pub struct ClusterArgs {
    /// etcd endpoints, http://host:port, comma-separated.
    #[arg(long, env = "CONCLAVE_ETCD", value_name = "URLS", value_delimiter = ',', required = true, value_parser = endpoint)]
    pub etcd: Vec<String>,
    /// Seconds to wait for an etcd that does not answer when this process starts; 0: one attempt.
    #[arg(long, env = "CONCLAVE_ETCD_PATIENCE", value_name = "SECONDS", default_value = "60", value_parser = patience)]
    pub etcd_patience: Duration,
    /// Name of the cluster; several may share one etcd.
    #[arg(long, env = "CONCLAVE_CLUSTER", value_name = "NAME", default_value = "default", value_parser = name)]
    pub cluster: String,
    /// Seconds after which a member that no longer answers etcd is gone; etcd itself grants no less than 2.
    #[arg(long, env = "CONCLAVE_LEASE_TTL", value_name = "SECONDS", default_value = "5", value_parser = lease_ttl)]
    pub lease_ttl: Duration,
    /// Unique name of this process in the cluster; drawn at start if not given.
    #[arg(long, env = "CONCLAVE_ID", value_name = "ID", value_parser = name)]
    pub id: Option<String>,
    /// Address under which the others reach this process, http://host:port; by default the one it listens on.
    #[arg(long, env = "CONCLAVE_ADVERTISE", value_name = "URL", value_parser = endpoint)]
    pub advertise: Option<String>,
    /// Whether members of the same host talk over Unix sockets rather than TCP, where they can.
    #[arg(long, env = "CONCLAVE_SAME_HOST", value_enum, default_value = "auto")]
    pub same_host: SameHost,
}

impl ClusterArgs {
    /// The id given, or a new one for `role`.
    ///
    /// # Errors
    /// When the operating system has no randomness to give.
    pub fn instance(&self, role: &str) -> std::io::Result<String> {
        self.id.clone().map_or_else(|| crate::id::instance_id(role), Ok)
    }
}

/// `http://host:port`; a bare `host:port` gets the scheme, a trailing slash goes.
///
/// # Errors
/// When the scheme is another one, or there is no host or no port.
pub fn endpoint(value: &str) -> Result<String, String> {
    let value = value.trim();
    let rest = match value.split_once("://") {
        None => value,
        Some(("http", rest)) => rest,
        Some((scheme, _)) => return Err(format!("scheme {scheme:?}: only http is supported")),
    };
    let authority = rest.trim_end_matches('/');
    let parsed: http::uri::Authority =
        authority.parse().map_err(|_| format!("{value:?}: expected http://host:port"))?;
    if parsed.host().is_empty() || parsed.port_u16().is_none() || authority.contains('@') {
        return Err(format!("{value:?}: expected http://host:port"));
    }
    Ok(format!("http://{authority}"))
}

/// A name that may stand in an etcd key, a label and a header: 1 to 63 of `[A-Za-z0-9._-]`.
///
/// # Errors
/// When it is too long, empty, or has another character.
pub fn name(value: &str) -> Result<String, String> {
    if value.is_empty() || value.len() > 63 {
        return Err(format!("{value:?} has {} characters, expected 1 to 63", value.len()));
    }
    match value.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-".contains(*c)) {
        Some(c) => Err(format!("{value:?} has {c:?}, expected letters, digits, '.', '_' or '-'")),
        None => Ok(value.to_owned()),
    }
}

fn lease_ttl(value: &str) -> Result<Duration, String> {
    seconds(value, 1..=3600)
}

fn patience(value: &str) -> Result<Duration, String> {
    seconds(value, 0..=86_400)
}

fn seconds(value: &str, range: RangeInclusive<u64>) -> Result<Duration, String> {
    let seconds: u64 = value.parse().map_err(|_| format!("{value:?} is no whole number of seconds"))?;
    if !range.contains(&seconds) {
        return Err(format!("{seconds} s, expected {} to {}", range.start(), range.end()));
    }
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        log: LogArgs,
        #[command(flatten)]
        cluster: ClusterArgs,
    }

    #[test]
    fn flags_are_read_with_their_defaults() {
        let parsed = Command::try_parse_from(["x", "--etcd", "10.0.0.1:2379,http://b:2379/", "--lease-ttl", "7"]);
        let Command { log, cluster } = parsed.expect("valid flags");
        assert_eq!(cluster.etcd, ["http://10.0.0.1:2379", "http://b:2379"]);
        assert_eq!((cluster.cluster.as_str(), cluster.lease_ttl), ("default", Duration::from_secs(7)));
        assert_eq!(cluster.etcd_patience, Duration::from_secs(60));
        assert_eq!((log.log.as_str(), log.log_format), ("info", LogFormat::Text));
        assert!(cluster.instance("expert").expect("randomness").starts_with("expert-"));
    }

    #[test]
    fn wrong_flags_are_refused_with_a_reason() {
        for (args, reason) in [
            (&["x"][..], "--etcd"),
            (&["x", "--etcd", "https://a:1"], "only http is supported"),
            (&["x", "--etcd", "a"], "expected http://host:port"),
            (&["x", "--etcd", "http://:2379"], "expected http://host:port"),
            (&["x", "--etcd", "a:1", "--lease-ttl", "0"], "expected 1 to 3600"),
            (&["x", "--etcd", "a:1", "--etcd-patience", "1m"], "\"1m\" is no whole number of seconds"),
            (&["x", "--etcd", "a:1", "--etcd-patience", "86401"], "expected 0 to 86400"),
            (&["x", "--etcd", "a:1", "--id", "a/b"], "'/'"),
            (&["x", "--etcd", "a:1", "--cluster", ""], "expected 1 to 63"),
            (&["x", "--etcd", "a:1", "--log-format", "xml"], "xml"),
            (&["x", "--etcd", "a:1", "--same-host", "on"], "[possible values: auto, off]"),
        ] {
            let error = Command::try_parse_from(args).expect_err("refused").to_string();
            assert!(error.contains(reason), "{args:?}: {error}");
        }
    }
}
