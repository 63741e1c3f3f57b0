//! The gRPC server: the services, health, reflection, and their limits.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use baton_proto::wire;
use baton_proto::wire::v1::cluster_server::ClusterServer;
use baton_proto::wire::v1::cluster_server::SERVICE_NAME as CLUSTER_NAME;
use baton_proto::wire::v1::inference_server::{InferenceServer, SERVICE_NAME};
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Error, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::Front;

/// A prompt of a million token ids fits.
const MAX_REQUEST_BYTES: usize = 8 << 20;
const MAX_STREAMS_PER_CONNECTION: u32 = 1024;
/// A client that vanished without a word is noticed after both, and its requests are cancelled.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const READINESS_INTERVAL: Duration = Duration::from_millis(100);

/// A client address that would carry prompts in the clear to other machines.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is open to other machines without encryption; listen on a loopback address or set \
     allow_plaintext = true"
)]
pub struct PlaintextRefused(SocketAddr);

/// Whether a plaintext port may be bound to `address`.
pub fn check_plaintext(address: SocketAddr, allow: bool) -> Result<(), PlaintextRefused> {
    let loopback = address.ip().to_canonical().is_loopback();
    if loopback || allow { Ok(()) } else { Err(PlaintextRefused(address)) }
}

/// Serves gRPC clients until `shutdown`, then finishes what runs. Without `tls`, in plaintext.
pub async fn serve_grpc(
    front: Front,
    listener: TcpListener,
    tls: Option<ServerTlsConfig>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let mut server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_pending_accept_reset_streams(Some(MAX_STREAMS_PER_CONNECTION as usize))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
    if let Some(tls) = tls {
        server = server.tls_config(tls)?;
    }
    let (reporter, health) = tonic_health::server::health_reporter();
    let inference =
        InferenceServer::new(front.clone()).max_decoding_message_size(MAX_REQUEST_BYTES);
    let cluster = ClusterServer::new(front.clone()).max_decoding_message_size(MAX_REQUEST_BYTES);
    let serving = server
        .add_service(inference)
        .add_service(cluster)
        .add_service(health)
        .add_service(reflection().build_v1().expect("the descriptors were compiled with us"))
        .add_service(reflection().build_v1alpha().expect("the descriptors were compiled with us"))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            shutdown,
        );
    tokio::select! {
        result = serving => result,
        () = report_health(front, reporter) => unreachable!("readiness is followed for ever"),
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

async fn report_health(front: Front, reporter: HealthReporter) {
    // Operators are answered as long as this process runs.
    reporter.set_service_status(CLUSTER_NAME, ServingStatus::Serving).await;
    let mut interval = tokio::time::interval(READINESS_INTERVAL);
    let mut last = None;
    loop {
        interval.tick().await;
        let ready = front.core.status().await.ready;
        if last.replace(ready) == Some(ready) {
            continue;
        }
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", SERVICE_NAME] {
            reporter.set_service_status(service, status).await;
        }
    }
}
