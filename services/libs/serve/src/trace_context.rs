//! W3C trace context as one string, so that it can ride in a message field.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// The current span as a W3C `traceparent` value; empty where there is none or spans are not exported.
pub fn traceparent() -> String {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut carrier);
    carrier.remove(TRACEPARENT).unwrap_or_default()
}

/// Makes `span` a child of the remote span that [`traceparent`] named. To be called before the span is entered; an empty
/// or malformed value leaves the span the root of a trace of its own, as the W3C recommendation asks.
pub fn set_parent(span: &Span, traceparent: &str) {
    if traceparent.is_empty() {
        return;
    }
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    // Fails only where spans are not exported at all or the span is disabled: nothing to connect then.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
}
