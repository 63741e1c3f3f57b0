//! The HTTP port: the API, health, version and metrics.

use std::future::Future;
use std::time::Duration;

use axum::extract::{FromRef, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;

use super::door::Entrance;
use super::messages::MessagesError;
use super::openai::error::ApiError;
use super::serve::serve_router;
use super::{Front, VERSION, messages, openai, responses};

/// How often samples of histograms are merged; without it they would pile up until scraped.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct App {
    front: Front,
    metrics: PrometheusHandle,
}

/// Serves HTTP clients until `shutdown`, then finishes what runs.
pub async fn serve_http(
    front: Front,
    metrics: PrometheusHandle,
    listener: TcpListener,
    entrance: &Entrance,
    shutdown: impl Future<Output = ()>,
) {
    let app = App { front, metrics: metrics.clone() };
    let router = openai::routes::<App>()
        .merge(messages::routes())
        .merge(responses::routes())
        .route("/health", get(health))
        .route("/live", get(|| async { "live\n" }))
        .route("/version", get(|| async { Json(json!({ "version": VERSION })) }))
        .route("/metrics", get(render_metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(app);
    tokio::select! {
        () = serve_router(router, listener, entrance, shutdown) => {}
        () = upkeep(metrics) => unreachable!("upkeep goes on for ever"),
    }
}

impl FromRef<App> for Front {
    fn from_ref(app: &App) -> Self {
        app.front.clone()
    }
}

/// An error in the form of the API that the path belongs to.
pub(super) fn error_response(path: &str, error: ApiError) -> Response {
    match path.starts_with("/v1/messages") {
        true => MessagesError(error).into_response(),
        false => error.into_response(),
    }
}

/// Nothing is there.
async fn not_found(method: Method, uri: Uri) -> Response {
    let what = format!("{method} {} is not served here", uri.path());
    error_response(uri.path(), ApiError::new(StatusCode::NOT_FOUND, "not_found", what))
}

/// Something is there for another method.
async fn method_not_allowed(method: Method, uri: Uri) -> Response {
    let what = format!("{} does not answer to {method}", uri.path());
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", what);
    error_response(uri.path(), error)
}

async fn upkeep(metrics: PrometheusHandle) {
    let mut interval = tokio::time::interval(METRICS_UPKEEP);
    loop {
        interval.tick().await;
        metrics.run_upkeep();
    }
}

/// 200 if a request would be served now, else 503 and why not.
async fn health(State(app): State<App>) -> impl IntoResponse {
    let status = app.front.status().await;
    if status.ready {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", status.reason))
    }
}

async fn render_metrics(State(app): State<App>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render())
}
