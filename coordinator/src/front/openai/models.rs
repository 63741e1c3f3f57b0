//! `/v1/models`.

use axum::extract::{Path, State};
use axum::response::Json;
use serde_json::{Value, json};

use super::error::ApiError;
use crate::front::Front;

/// Models and aliases that a request would be served with now.
pub(super) async fn list(State(front): State<Front>) -> Json<Value> {
    Json(json!({ "object": "list", "data": served(&front).await }))
}

/// One of them.
pub(super) async fn retrieve(
    State(front): State<Front>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let models = served(&front).await;
    let model = models.into_iter().find(|model| model["id"] == name.as_str());
    let missing = || ApiError::no_model(format!("model {name:.80?} is not served here now"));
    model.map(Json).ok_or_else(missing)
}

async fn served(front: &Front) -> Vec<Value> {
    let ready = front.core.status().await.models;
    let length = |name: &str| front.core.model(name).map(|model| model.max_model_len);
    let models = ready.iter().filter_map(|name| Some(item(name, name, length(name)?, front)));
    let mut all: Vec<_> = models.collect();
    for (alias, models) in front.aliases.names() {
        let ready = models.iter().filter(|model| ready.iter().any(|name| name == *model));
        // Whichever of its models answers, so much fits.
        let shortest = ready.filter_map(|model| length(model)).min();
        all.extend(shortest.map(|length| item(alias, &models[0], length, front)));
    }
    all
}

fn item(name: &str, root: &str, max_model_len: u32, front: &Front) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": front.started,
        "owned_by": "baton",
        "root": root,
        "parent": null,
        "max_model_len": max_model_len,
    })
}
