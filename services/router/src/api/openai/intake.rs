//! What happens to every HTTP request before and after its handler: id, span, metrics, API key, reading of the body.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use conclave_serve::Error;
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use tracing::{Instrument, Span};

use super::{Api, error::ApiError, fields::Fields};
use crate::{front::RequestContext, trace};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Bodies from this size on are parsed on the blocking pool.
const LARGE: usize = 256 << 10;
/// A refused body is read on up to this multiple of the limit, so that the client gets to see the answer.
const DRAIN: usize = 4;

/// Gives a request its id and its span, and counts its answer.
pub(super) async fn observe(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let endpoint = endpoint(request.uri().path());
    let (span, context) = match begin(endpoint, request.headers()) {
        Ok(begun) => begun,
        Err(error) => return ApiError::from(error).into_response(),
    };
    let id = HeaderValue::from_str(&context.request_id);
    request.extensions_mut().insert(context);
    let mut response = next.run(request).instrument(span).await;
    if let Ok(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    api.front.metrics().request(endpoint, response.status().as_str());
    response
}

fn begin(endpoint: &str, headers: &HeaderMap) -> Result<(Span, RequestContext), Error> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    trace::begin(endpoint, header("x-request-id"), header("traceparent"))
}

/// Asks for the API key.
pub(super) async fn authenticate(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let key = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    match api.keys.check(key) {
        Ok(tenant) => {
            if let Some(context) = request.extensions_mut().get_mut::<RequestContext>() {
                context.cache_salt = tenant.cache_salt();
            }
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    }
}

/// The endpoint as metrics and spans name it.
fn endpoint(path: &str) -> &'static str {
    const KNOWN: [&str; 7] =
        ["/v1/chat/completions", "/v1/completions", "/v1/models", "/livez", "/readyz", "/health", "/metrics"];
    match KNOWN.iter().find(|known| **known == path) {
        Some(known) => known,
        None if path.starts_with("/v1/models/") => "/v1/models",
        None => "other",
    }
}

/// Refuses what says that it is no JSON.
pub(super) fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let found = String::from_utf8_lossy(value.as_bytes());
    let kind = found.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!("content-type: found {found:?}, expected \"application/json\"");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message).with_code("unsupported_media_type"))
}

/// Reads a body of at most `most` bytes.
pub(super) async fn read_body(body: Body, most: usize) -> Result<Bytes, ApiError> {
    let mut parts = body.into_data_stream();
    let mut read = Vec::new();
    let mut total = 0_usize;
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| ApiError::invalid(format!("the body could not be read: {error}")))?;
        total = total.saturating_add(part.len());
        if total > most.saturating_mul(DRAIN) {
            break;
        }
        if total <= most {
            read.extend_from_slice(&part);
        }
    }
    if total <= most {
        return Ok(read.into());
    }
    let message = format!("body: found {total} bytes or more, expected at most {most}");
    Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("request_too_large"))
}

/// Parses a body as a JSON object; a large one off the request threads.
pub(super) async fn parse(body: Bytes) -> Result<Fields, ApiError> {
    if body.len() < LARGE {
        return Fields::parse(&body);
    }
    let parsed = tokio::task::spawn_blocking(move || Fields::parse(&body)).await;
    parsed
        .unwrap_or_else(|error| Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("JSON parser: {error}"))))
}
