//! The HTTP port: health, version, metrics, models.

use std::future::Future;
use std::io;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{Front, VERSION};

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
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let app = App { front, metrics: metrics.clone() };
    let router = Router::new()
        .route("/health", get(health))
        .route("/live", get(|| async { "live\n" }))
        .route("/version", get(|| async { Json(json!({ "version": VERSION })) }))
        .route("/metrics", get(render_metrics))
        .route("/v1/models", get(models))
        .with_state(app);
    let serving = axum::serve(listener, router).with_graceful_shutdown(shutdown);
    tokio::select! {
        result = serving.into_future() => result,
        () = upkeep(metrics) => unreachable!("upkeep goes on for ever"),
    }
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
    let status = app.front.core.status().await;
    if status.ready {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", status.reason))
    }
}

async fn render_metrics(State(app): State<App>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render())
}

/// Models that a request would be served with now, as OpenAI lists them.
async fn models(State(app): State<App>) -> Json<Value> {
    let ready = app.front.core.status().await.models;
    let models = ready.iter().filter_map(|name| app.front.core.model(name)).map(|model| {
        json!({
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "baton",
            "max_model_len": model.max_model_len,
        })
    });
    Json(json!({ "object": "list", "data": models.collect::<Vec<_>>() }))
}
