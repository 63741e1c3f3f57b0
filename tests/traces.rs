//! A request is one tree of spans, over the client, the coordinator and both nodes.

use std::collections::HashMap;

use baton_cli::launcher::ClusterOptions;
use baton_tests::{Answer, Chance, PATIENCE, TestCluster, options, request};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

const CLIENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Passes on what it is sent.
struct Collector(mpsc::UnboundedSender<Span>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        for span in scopes.flat_map(|scope| scope.spans) {
            self.0.send(span).unwrap();
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn traced(endpoint: String) -> TestCluster {
    let never = Some("never".to_owned());
    let otlp_endpoint = Some(endpoint);
    TestCluster::start(ClusterOptions { local_prefill: never, otlp_endpoint, ..options(1, 1) })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_tree_of_spans() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut received) = mpsc::unbounded_channel();
    let collector = TraceServiceServer::new(Collector(sender));
    let serving = tonic::transport::Server::builder().add_service(collector);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));

    let cluster = traced(endpoint).await;
    let mut asked = Request::new(request(Chance(1).tokens(200), 8));
    asked.metadata_mut().insert("traceparent", CLIENT.parse().unwrap());
    let stream = cluster.inference().generate(asked).await.unwrap().into_inner();
    Answer::gather(stream).await.unwrap();

    let mut spans = HashMap::new();
    while spans.len() < 4 {
        let span = tokio::time::timeout(PATIENCE, received.recv()).await;
        let Ok(Some(span)) = span else { panic!("only {:?}", spans.keys()) };
        let name = span.name.split(' ').next().unwrap().to_owned();
        spans.insert(name, span);
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for (name, parent) in [
        ("baton.prefill", "generate"),
        ("baton.decode", "generate"),
        ("baton.kv_transfer", "baton.prefill"),
    ] {
        assert_eq!(spans[name].parent_span_id, spans[parent].span_id, "{name}");
    }
    assert_eq!(hex(&spans["generate"].parent_span_id), CLIENT[36..52]);
    for (name, span) in &spans {
        assert_eq!(hex(&span.trace_id), CLIENT[3..35], "{name}");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_collector_costs_nothing() {
    // Bound and closed again: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let cluster = traced(format!("http://{address}")).await;
    for seed in 0..20 {
        cluster.complete(request(Chance(seed).tokens(100), 8)).await.unwrap();
    }
    cluster.idle().await;
}
