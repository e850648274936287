//! Logs to stderr and spans to an OTLP receiver.

use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

pub use crate::trace_context::{set_parent, traceparent};

/// How long one export may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the end of a process waits for the last spans to be delivered.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged and where spans go.
#[derive(Debug, Clone)]
pub struct TelemetryConfig {
    /// Text or JSON lines.
    pub log_format: LogFormat,
    /// Filter directives, such as `info` or `warn,conclave_router=debug`.
    pub log: String,
    /// `http://host:port` of an OTLP/gRPC receiver; none: spans stay in the process.
    pub otlp_endpoint: Option<String>,
    /// `service.name` of the spans.
    pub service: String,
    /// `service.instance.id` of the spans.
    pub instance: String,
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("log filter {filter:?}: {message}")]
    Filter { filter: String, message: String },
    /// The endpoint is no URL.
    #[error("OTLP endpoint {endpoint:?}: {message}")]
    Otlp { endpoint: String, message: String },
    /// Logs go elsewhere already.
    #[error("telemetry is set up already")]
    Twice,
}

/// Delivers the last spans when the process ends. Keep it until then.
#[must_use]
#[derive(Debug)]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Guard {
    /// Delivers what is still held, for two seconds at most, without blocking the runtime.
    pub async fn shutdown(mut self) {
        let provider = self.provider.take();
        // The only failure is a panic in the exporter, at a moment when nobody can act on it.
        let _ = tokio::task::spawn_blocking(move || flush(provider)).await;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        flush(self.provider.take());
    }
}

fn flush(provider: Option<SdkTracerProvider>) {
    if let Some(Err(error)) = provider.map(|provider| provider.shutdown_with_timeout(FLUSH_TIMEOUT)) {
        tracing::warn!(%error, "last spans were not delivered");
    }
}

/// Sends the whole process's logs and spans where `config` says. With an OTLP endpoint, call it inside a Tokio runtime.
///
/// # Errors
/// When the filter or the endpoint is wrong, or when it was called before. A receiver that does not answer is no error.
pub fn init(config: &TelemetryConfig) -> Result<Guard, TelemetryError> {
    let (subscriber, guard) = build(config)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| TelemetryError::Twice)?;
    Ok(guard)
}

fn build(config: &TelemetryConfig) -> Result<(impl Subscriber + Send + Sync, Guard), TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(&config.log)
        .map_err(|error| TelemetryError::Filter { filter: config.log.clone(), message: error.to_string() })?;
    let provider = config.otlp_endpoint.as_deref().map(|endpoint| exporter(endpoint, config)).transpose()?;
    let spans = provider.as_ref().map(spans);
    let subscriber = tracing_subscriber::registry().with(lines(config.log_format).with_filter(filter)).with(spans);
    Ok((subscriber, Guard { provider }))
}

fn lines<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // When nobody reads the log any more, a report of that would panic.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    }
}

/// Exports our own spans down to level info whatever the log filter says, and none of the exporter's own transport.
fn spans<S>(provider: &SdkTracerProvider) -> impl Layer<S> + Send + Sync + use<S>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let ours = filter_fn(|meta| *meta.level() <= Level::INFO && meta.target().starts_with("conclave"));
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("conclave"));
    layer.with_filter(ours.with_max_level_hint(LevelFilter::INFO))
}

fn exporter(endpoint: &str, config: &TelemetryConfig) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|error| TelemetryError::Otlp { endpoint: endpoint.to_owned(), message: error.to_string() })?;
    let resource = Resource::builder()
        .with_service_name(config.service.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", config.instance.clone()))
        .build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

#[cfg(test)]
mod tests;
