//! The HTTP port: the API, health, version and metrics.

use std::future::Future;
use std::time::Duration;

use axum::extract::{FromRef, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;

use super::door::Entrance;
use super::inference::random;
use super::serve::serve_router;
use super::{Front, VERSION, messages, openai, responses};

/// How often samples of histograms are merged; without it they would pile up until scraped.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A longer name is replaced by one of ours.
const MAX_REQUEST_ID_BYTES: usize = 256;

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
        .fallback(openai::not_found)
        .method_not_allowed_fallback(openai::method_not_allowed)
        .layer(from_fn(name_request))
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

/// Says in every response which request it answers: by the name that the client gave, or a new one.
async fn name_request(request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID);
    let given = given.filter(|id| (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())).cloned();
    let mut response = next.run(request).await;
    let id = given.unwrap_or_else(|| {
        let id = format!("req_{:032x}", u128::from_ne_bytes(random()));
        HeaderValue::from_str(&id).expect("hexadecimal digits are a header's value")
    });
    response.headers_mut().insert(REQUEST_ID, id);
    response
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
