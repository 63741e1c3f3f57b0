//! Serving both client ports: gRPC with health and reflection, and HTTP; and their limits.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use baton_proto::ids::Role;
use baton_proto::wire;
use baton_proto::wire::engine::vllm_engine_server::SERVICE_NAME as GATEWAY_NAME;
use baton_proto::wire::engine::vllm_engine_server::VllmEngineServer;
use baton_proto::wire::v1::cluster_server::ClusterServer;
use baton_proto::wire::v1::cluster_server::SERVICE_NAME as CLUSTER_NAME;
use baton_proto::wire::v1::inference_server::{InferenceServer, SERVICE_NAME};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::service::Routes;
use tonic::transport::{Error, Server};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::Front;
use super::door::{Entrance, Protocol, guard_http, guard_rpc};
use super::openai::body::MAX_BODY_BYTES;

const MAX_STREAMS_PER_CONNECTION: u32 = 1024;
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Of a question about services.
const MAX_QUESTION_BYTES: usize = 16 << 10;
/// A client that vanished without a word is noticed after both, and its requests are cancelled.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const READINESS_INTERVAL: Duration = Duration::from_millis(100);

/// A client address that would carry prompts in the clear to other machines.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is open to other machines without encryption; set tls_cert and tls_key, listen on a \
     loopback address, or set allow_plaintext = true"
)]
pub struct PlaintextRefused(SocketAddr);

/// Whether a plaintext port may be bound to `address`.
pub fn check_plaintext(address: SocketAddr, allow: bool) -> Result<(), PlaintextRefused> {
    let loopback = address.ip().to_canonical().is_loopback();
    if loopback || allow { Ok(()) } else { Err(PlaintextRefused(address)) }
}

/// Serves gRPC clients until `shutdown`, then finishes what runs.
pub async fn serve_grpc(
    front: Front,
    listener: TcpListener,
    entrance: &Entrance,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let (v1, v1alpha) = (reflection().build_v1(), reflection().build_v1alpha());
    let v1 = v1.expect("the descriptors were compiled with us");
    let v1alpha = v1alpha.expect("the descriptors were compiled with us");
    let routes = routes(&front)
        .add_service(health.max_decoding_message_size(MAX_QUESTION_BYTES))
        .add_service(v1.max_decoding_message_size(MAX_QUESTION_BYTES))
        .add_service(v1alpha.max_decoding_message_size(MAX_QUESTION_BYTES));
    let guard = from_fn_with_state(entrance.clone(), guard_rpc);
    let serving = Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_pending_accept_reset_streams(Some(MAX_STREAMS_PER_CONNECTION as usize))
        .http2_max_header_list_size(MAX_HEADER_BYTES as u32)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(routes.into_axum_router().layer(guard).into())
        .serve_with_incoming_shutdown(entrance.incoming(listener, Protocol::Grpc), shutdown);
    tokio::select! {
        result = serving => result,
        () = report_health(&front, reporter) => unreachable!("readiness is followed for ever"),
    }
}

/// The services, without those that describe them.
fn routes(front: &Front) -> Routes {
    Routes::new(InferenceServer::new(front.clone()).max_decoding_message_size(MAX_BODY_BYTES))
        .add_service(ClusterServer::new(front.clone()).max_decoding_message_size(MAX_BODY_BYTES))
        .add_service(VllmEngineServer::new(front.clone()).max_decoding_message_size(MAX_BODY_BYTES))
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Tells of each service, and of each role whether it has nodes. Draining is told at once.
async fn report_health(front: &Front, reporter: HealthReporter) {
    // Operators are answered as long as this process runs.
    reporter.set_service_status(CLUSTER_NAME, ServingStatus::Serving).await;
    let mut interval = tokio::time::interval(READINESS_INTERVAL);
    let mut last = None;
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = front.running.until_draining(), if !front.running.draining() => {}
        }
        let status = front.status().await;
        let draining = front.running.draining();
        let of_role = |role: Role, nodes: usize| (role.as_str(), nodes > 0 && !draining);
        let all = [
            ("", status.ready),
            (SERVICE_NAME, status.ready),
            (GATEWAY_NAME, status.ready),
            of_role(Role::Prefill, status.prefill_nodes),
            of_role(Role::Decode, status.decode_nodes),
        ];
        if last.replace(all) == Some(all) {
            continue;
        }
        for (service, ready) in all {
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            reporter.set_service_status(service, status).await;
        }
    }
}

/// Serves `router` over HTTP/1.1 until `shutdown`, then finishes what runs.
pub(super) async fn serve_router(
    router: Router,
    listener: TcpListener,
    entrance: &Entrance,
    shutdown: impl Future<Output = ()>,
) {
    let guard = from_fn_with_state(entrance.clone(), guard_http);
    let service = TowerToHyperService::new(router.layer(guard));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(entrance.patience.headers)
        .max_buf_size(MAX_HEADER_BYTES);
    let mut incoming = entrance.incoming(listener, Protocol::Http);
    let (closing, closed) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let connection = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            connection = incoming.next() => connection,
        };
        let Some(Ok(connection)) = connection else { break };
        let serving = builder.serve_connection(TokioIo::new(connection), service.clone());
        let mut closed = closed.clone();
        connections.spawn(async move {
            let mut serving = pin!(serving);
            let result = tokio::select! {
                result = &mut serving => result,
                _ = closed.changed() => {
                    serving.as_mut().graceful_shutdown();
                    serving.await
                }
            };
            if let Err(error) = result {
                tracing::debug!(%error, "an HTTP connection broke");
            }
        });
    }
    drop(incoming);
    closing.send_replace(());
    while connections.join_next().await.is_some() {}
}
