//! Delivers real spans to a real OTLP receiver on loopback.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tracing::subscriber::with_default;

use super::*;

#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().expect("no panic").push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

struct Received {
    service: String,
    name: String,
    trace: Vec<u8>,
    span: Vec<u8>,
    parent: Vec<u8>,
}

impl Receiver {
    async fn listen(&self) -> String {
        let listener = crate::listen::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let service = TraceServiceServer::new(self.clone());
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        endpoint
    }

    fn spans(&self) -> Vec<Received> {
        let mut spans = Vec::new();
        for resource in self.0.lock().expect("no panic").iter().flat_map(|request| &request.resource_spans) {
            let attributes = resource.resource.iter().flat_map(|r| &r.attributes);
            let service = attributes.filter(|a| a.key == "service.name").find_map(|a| a.value.clone()?.value);
            let Some(Value::StringValue(service)) = service else { panic!("no service name: {resource:?}") };
            for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
                spans.push(Received {
                    service: service.clone(),
                    name: span.name.clone(),
                    trace: span.trace_id.clone(),
                    span: span.span_id.clone(),
                    parent: span.parent_span_id.clone(),
                });
            }
        }
        spans
    }
}

fn config(service: &str, endpoint: Option<String>) -> TelemetryConfig {
    TelemetryConfig {
        log_format: LogFormat::Json,
        log: "off".into(),
        otlp_endpoint: endpoint,
        service: service.into(),
        instance: format!("{service}-1"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_is_one_trace_across_two_processes() {
    let receiver = Receiver::default();
    let endpoint = receiver.listen().await;
    let (router, router_guard) = build(&config("router", Some(endpoint.clone()))).expect("valid");
    let (expert, expert_guard) = build(&config("expert", Some(endpoint))).expect("valid");

    let carried = with_default(router, || tracing::info_span!("request").in_scope(traceparent));
    assert_eq!(carried.len(), 55, "a W3C traceparent: {carried:?}");
    with_default(expert, || {
        let span = tracing::info_span!("batch");
        set_parent(&span, &carried);
        span.in_scope(|| tracing::debug_span!("too fine to be exported").in_scope(|| ()));
    });
    router_guard.shutdown().await;
    expert_guard.shutdown().await;

    let spans = receiver.spans();
    let found: Vec<(&str, &str)> = spans.iter().map(|s| (s.service.as_str(), s.name.as_str())).collect();
    assert_eq!(found, [("router", "request"), ("expert", "batch")], "both were delivered, nothing else was");
    assert_eq!(spans[0].trace, spans[1].trace, "one trace id");
    assert_eq!(spans[1].parent, spans[0].span, "the batch is a child of the request");
    assert!(carried.contains(&hex(&spans[0].trace)), "{carried} names the trace");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_parent_starts_a_trace_of_its_own() {
    let receiver = Receiver::default();
    let (subscriber, guard) = build(&config("expert", Some(receiver.listen().await))).expect("valid");
    with_default(subscriber, || {
        for parent in ["", "nonsense", "00-00000000000000000000000000000000-0000000000000000-01"] {
            let span = tracing::info_span!("batch");
            set_parent(&span, parent);
            span.in_scope(|| ());
        }
    });
    guard.shutdown().await;
    let spans = receiver.spans();
    assert_eq!(spans.len(), 3);
    assert!(spans.iter().all(|span| span.parent.is_empty()), "no parents");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_is_away_does_not_hold_the_end_up() {
    let closed = crate::listen::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("bound");
    let (subscriber, guard) = build(&config("router", Some(format!("http://{closed}")))).expect("valid");
    with_default(subscriber, || tracing::info_span!("request").in_scope(|| ()));
    tokio::time::timeout(Duration::from_secs(20), guard.shutdown()).await.expect("the end is bounded");
}

#[test]
fn without_an_endpoint_nothing_is_carried() {
    let (subscriber, _guard) = build(&config("router", None)).expect("valid");
    assert_eq!(with_default(subscriber, || tracing::info_span!("request").in_scope(traceparent)), "");
}

#[test]
fn a_wrong_filter_is_named() {
    let wrong = TelemetryConfig { log: "conclave=loud".into(), ..config("router", None) };
    let Err(error) = build(&wrong) else { panic!("loud is no level") };
    assert!(error.to_string().starts_with("log filter \"conclave=loud\": "), "{error}");
}
