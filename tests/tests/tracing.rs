//! One request is one trace across all processes: a real OTLP receiver gathers what they export.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use conclave_tests::{Cluster, ClusterSpec, chat, free_port, greedy};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::ResourceSpans,
};
use tonic::{Request, Response, Status, transport::Server};

#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<ResourceSpans>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn service_name(spans: &ResourceSpans) -> String {
    let attributes = spans.resource.as_ref().map(|r| r.attributes.as_slice()).unwrap_or_default();
    let value = attributes.iter().find(|a| a.key == "service.name").and_then(|a| a.value.clone()).and_then(|v| v.value);
    match value {
        Some(Value::StringValue(name)) => name,
        other => panic!("service.name expected, found {other:?}"),
    }
}

impl Receiver {
    /// Trace id → the services whose spans carry it.
    fn services_by_trace(&self) -> BTreeMap<Vec<u8>, BTreeSet<String>> {
        let mut traces: BTreeMap<Vec<u8>, BTreeSet<String>> = BTreeMap::new();
        for resource in self.0.lock().unwrap().iter() {
            for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
                traces.entry(span.trace_id.clone()).or_default().insert(service_name(resource));
            }
        }
        traces
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_one_trace() {
    let address = format!("127.0.0.1:{}", free_port());
    let receiver = Receiver::default();
    let server = Server::builder().add_service(TraceServiceServer::new(receiver.clone()));
    tokio::spawn(server.serve(address.parse().unwrap()));

    let spec = ClusterSpec { flags: vec![format!("--otlp-endpoint=http://{address}")], ..ClusterSpec::even(2) };
    let cluster = Cluster::start(spec).await.unwrap();
    cluster.client().await.unwrap().generate(greedy(chat("Who are you?"), 4)).await.unwrap();

    let all: BTreeSet<String> = ["attention", "expert", "router"].map(|role| format!("conclave-{role}")).into();
    for _ in 0..100 {
        if receiver.services_by_trace().values().any(|services| *services == all) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no trace has spans of {all:?}; found {:?}", receiver.services_by_trace().values());
}
