//! The public HTTP address of a process that is not ready to serve there: it loads, or waits for its coordinator.

use std::sync::{Arc, OnceLock};

use axum::Router;
use conclave_serve::{Readiness, admin};
use prometheus::Registry;
use tower::{ServiceExt, service_fn};

use crate::api::openai;

/// Shows the admin endpoints, and refuses requests until it is opened.
#[derive(Clone)]
pub struct Entrance {
    closed: Router,
    opened: Arc<OnceLock<Router>>,
}

impl Entrance {
    /// A closed one.
    pub fn new(readiness: Readiness, registry: Registry) -> Self {
        let closed = admin::router(readiness.clone(), registry);
        let closed = closed.fallback(move || std::future::ready(openai::not_ready(&readiness.state())));
        Self { closed, opened: Arc::default() }
    }

    /// From now on requests go to `api`, which shows the admin endpoints too.
    pub fn open(&self, api: Router) {
        // Opened once.
        let _ = self.opened.set(api);
    }

    /// What is served.
    pub fn router(&self) -> Router {
        let Self { closed, opened } = self.clone();
        Router::new()
            .fallback_service(service_fn(move |request| opened.get().unwrap_or(&closed).clone().oneshot(request)))
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        body::{Body, to_bytes},
        routing::get,
    };
    use conclave_serve::State;

    use super::*;

    async fn ask(router: &Router, path: &str) -> (u16, String) {
        let request = http::Request::get(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        (status, String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn requests_are_refused_until_it_is_opened() {
        let readiness = Readiness::starting("loading weights");
        let entrance = Entrance::new(readiness.clone(), Registry::new());
        let router = entrance.router();
        assert_eq!(ask(&router, "/livez").await, (200, "starting: loading weights\n".to_owned()));
        assert_eq!(ask(&router, "/readyz").await, (503, "starting: loading weights\n".to_owned()));
        let (status, body) = ask(&router, "/v1/models").await;
        assert!(status == 503 && body.contains(r#""message":"starting: loading weights""#), "{status} {body}");
        assert!(body.contains(r#""code":"service_unavailable""#), "{body}");
        entrance.open(Router::new().route("/v1/models", get(|| async { "models" })));
        readiness.set(State::Ready);
        assert_eq!(ask(&router, "/v1/models").await, (200, "models".to_owned()));
        assert_eq!(ask(&router, "/nothing").await.0, 404);
    }
}
