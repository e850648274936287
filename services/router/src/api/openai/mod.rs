//! OpenAI's HTTP API.

mod answer;
mod body;
mod chat;
mod completions;
mod error;
mod fields;
mod intake;
mod logprobs;
mod models;
mod render;
mod request;

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Router,
    extract::{Request, State},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use conclave_serve::{Error, ErrorKind};
use http::{Method, StatusCode, Uri};

use self::{answer::Answer, error::ApiError, fields::Fields, render::Endpoint};
use super::ApiKeys;
use crate::front::{Front, RequestContext};

/// Largest body in bytes; a prompt of the largest allowed text fits, however it is escaped.
const MAX_BODY_BYTES: usize = 32 << 20;

/// What the handlers share.
struct Api {
    front: Arc<Front>,
    keys: ApiKeys,
    /// When the model began to be served, in seconds since the Unix epoch.
    since: u64,
}

/// What requests get from a process in this state: it cannot serve them yet.
pub(crate) fn not_ready(state: &conclave_serve::State) -> Response {
    ApiError::from(Error::new(ErrorKind::Unavailable, state.to_string())).into_response()
}

/// The `/v1` routes, and errors in OpenAI's shape for all that does not exist. `others` are served beside them, without
/// keys.
pub fn router(front: Arc<Front>, keys: ApiKeys, others: Router) -> Router {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    let api = Arc::new(Api { front, keys, since });
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route_layer(middleware::from_fn_with_state(api.clone(), intake::authenticate))
        .with_state(api.clone())
        .merge(others)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(api, intake::observe))
}

async fn chat_completions(
    State(api): State<Arc<Api>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let fields = read(request).await?;
    let (request, shape) = chat::parse(fields)?;
    Answer::start(&api.front, Endpoint::Chat, vec![request], shape, context).await?.respond().await
}

async fn text_completions(
    State(api): State<Arc<Api>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let fields = read(request).await?;
    let (requests, shape) = completions::parse(fields)?;
    Answer::start(&api.front, Endpoint::Completions, requests, shape, context).await?.respond().await
}

async fn read(request: Request) -> Result<Fields, ApiError> {
    intake::check_content_type(request.headers())?;
    let body = intake::read_body(request.into_body(), MAX_BODY_BYTES).await?;
    intake::parse(body).await
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {method} {}", uri.path())).with_code("unknown_url")
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} is there, but not for {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
}
