//! The HTTP endpoints that every process has for whoever looks after it: liveness, readiness, metrics.

use axum::Router;
use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::metrics;
use crate::readiness::{Readiness, State};

#[derive(Clone)]
struct Admin {
    readiness: Readiness,
    registry: Registry,
}

/// `/livez`, `/readyz`, `/health` (the same as `/readyz`) and `/metrics`.
pub fn router(readiness: Readiness, registry: Registry) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/health", get(readyz))
        .route("/metrics", get(render))
        .with_state(Admin { readiness, registry })
}

/// Serves `router` on `listener` until `stop`, then finishes the requests under way.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) -> std::io::Result<()> {
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// 200 unless the process cannot go on: then a supervisor should restart it.
async fn livez(Shared(admin): Shared<Admin>) -> Response {
    let state = admin.readiness.state();
    answer(!matches!(state, State::Failed(_)), &state)
}

/// 200 while the process takes work.
async fn readyz(Shared(admin): Shared<Admin>) -> Response {
    let state = admin.readiness.state();
    answer(state == State::Ready, &state)
}

async fn render(Shared(admin): Shared<Admin>) -> Response {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(&admin.registry)).into_response()
}

fn answer(ok: bool, state: &State) -> Response {
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{state}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::{Body, to_bytes};
    use tower::ServiceExt;

    use super::*;

    async fn ask(router: &Router, path: &str) -> (u16, String) {
        let request = http::Request::get(path).body(Body::empty()).expect("a request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 1 << 20).await.expect("a body");
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn endpoints_follow_the_state() {
        let readiness = Readiness::starting("loading weights");
        let router = router(readiness.clone(), Registry::new());
        assert_eq!(ask(&router, "/livez").await.0, 200);
        assert_eq!(ask(&router, "/readyz").await, (503, "starting: loading weights\n".into()));
        readiness.set(State::Ready);
        assert_eq!(ask(&router, "/readyz").await, (200, "ready\n".into()));
        assert_eq!(ask(&router, "/health").await, (200, "ready\n".into()));
        readiness.set(State::Failed("id taken over".into()));
        assert_eq!(ask(&router, "/livez").await, (503, "failed: id taken over\n".into()));
        assert_eq!(ask(&router, "/elsewhere").await.0, 404);
    }

    #[tokio::test]
    async fn metrics_are_served_as_text() {
        let registry = Registry::new();
        metrics::register_process(&registry, "test").expect("a fresh registry");
        let (status, body) = ask(&router(Readiness::starting("x"), registry), "/metrics").await;
        assert_eq!(status, 200);
        assert!(body.contains("conclave_build_info{"), "{body}");
    }

    #[tokio::test]
    async fn the_server_ends_when_told() {
        let listener = crate::listen::bind("127.0.0.1:0").await.expect("a free port");
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, router(Readiness::starting("x"), Registry::new()), stop.clone()));
        stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(5), server).await.expect("it ends");
        assert!(ended.expect("no panic").is_ok());
    }
}
