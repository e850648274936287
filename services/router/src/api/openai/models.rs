//! `GET /v1/models`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde::Serialize;

use super::{Api, error::ApiError};
use crate::front::{Front, FrontError};

/// A served model.
#[derive(Serialize)]
pub(super) struct ModelBody {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: u32,
}

#[derive(Serialize)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<ModelBody>,
}

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![model(&api.front, api.since)] })
}

pub(super) async fn one(State(api): State<Arc<Api>>, Path(asked): Path<String>) -> Result<Json<ModelBody>, ApiError> {
    let served = api.front.model().name.clone();
    if asked == served {
        return Ok(Json(model(&api.front, api.since)));
    }
    Err(FrontError::ModelNotFound { asked, served }.into())
}

fn model(front: &Front, since: u64) -> ModelBody {
    let id = front.model().name.clone();
    ModelBody { id, object: "model", created: since, owned_by: "conclave", max_model_len: front.context_limit() }
}
