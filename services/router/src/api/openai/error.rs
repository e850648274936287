//! Errors in OpenAI's shape.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use conclave_serve::{Error, ErrorKind};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::front::FrontError;

/// Seconds after which a refused client may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// An error response.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

#[derive(Serialize)]
pub(super) struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Serialize)]
struct ErrorDetail {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    /// An error of a status.
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A wrong request.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(super) fn body(self) -> ErrorBody {
        let Self { status, message, param, code } = self;
        ErrorBody { error: ErrorDetail { message, r#type: type_of(status), param, code } }
    }
}

fn type_of(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

fn code_of(kind: ErrorKind) -> Option<&'static str> {
    match kind {
        ErrorKind::Unauthenticated => Some("invalid_api_key"),
        ErrorKind::ResourceExhausted => Some("rate_limit_exceeded"),
        ErrorKind::DeadlineExceeded => Some("deadline_exceeded"),
        ErrorKind::Unavailable => Some("service_unavailable"),
        _ => None,
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self { status: error.kind.http(), code: code_of(error.kind), message: error.message, param: error.param }
    }
}

impl From<FrontError> for ApiError {
    fn from(error: FrontError) -> Self {
        let code = error.code();
        let api = Self::from(Error::from(error));
        Self { code: code.or(api.code), ..api }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(self.body())).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}
