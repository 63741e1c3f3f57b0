//! A request is one tree of spans, over the client, the coordinator and both nodes.

use std::collections::{BTreeMap, HashMap};

use baton_cli::launcher::ClusterOptions;
use baton_tests::{Answer, Chance, PATIENCE, TestCluster, options, request};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
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

/// A collector, and the spans that it was sent.
async fn collector() -> (String, mpsc::UnboundedReceiver<Span>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, received) = mpsc::unbounded_channel();
    let collector = TraceServiceServer::new(Collector(sender));
    let serving = tonic::transport::Server::builder().add_service(collector);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    (endpoint, received)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(span: &Span) -> HashMap<&str, Value> {
    let all = span.attributes.iter();
    all.map(|said| (&*said.key, said.value.clone().unwrap().value.unwrap())).collect()
}

fn text(text: &str) -> Value {
    Value::StringValue(text.to_owned())
}

fn texts(all: &[&str]) -> Value {
    let values = all.iter().map(|one| AnyValue { value: Some(text(one)) }).collect();
    Value::ArrayValue(ArrayValue { values })
}

/// Sends a conversation over HTTP, as a part of the client's trace.
async fn chat(cluster: &TestCluster, body: &serde_json::Value) -> String {
    let address = cluster.cluster.http();
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ntraceparent: {CLIENT}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn traced(endpoint: String) -> TestCluster {
    let never = Some("never".to_owned());
    let otlp_endpoint = Some(endpoint);
    TestCluster::start(ClusterOptions { local_prefill: never, otlp_endpoint, ..options(1, 1) })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_tree_of_spans() {
    let (endpoint, mut received) = collector().await;
    let cluster = traced(endpoint).await;
    let mut asked = Request::new(request(Chance(1).tokens(200), 8));
    asked.metadata_mut().insert("traceparent", CLIENT.parse().unwrap());
    let stream = cluster.inference().generate(asked).await.unwrap().into_inner();
    Answer::gather(stream).await.unwrap();

    let mut spans = HashMap::new();
    while spans.len() < 5 {
        let span = tokio::time::timeout(PATIENCE, received.recv()).await;
        let Ok(Some(span)) = span else { panic!("only {:?}", spans.keys()) };
        let name = span.name.split(' ').next().unwrap().to_owned();
        spans.insert(name, span);
    }
    for (name, parent) in [
        ("baton.queue", "text_completion"),
        ("baton.prefill", "text_completion"),
        ("baton.decode", "text_completion"),
        ("baton.kv_transfer", "baton.prefill"),
    ] {
        assert_eq!(spans[name].parent_span_id, spans[parent].span_id, "{name}");
    }
    let call = &spans["text_completion"];
    assert_eq!((&*call.name, call.kind()), ("text_completion demo", SpanKind::Server));
    assert_eq!(hex(&call.parent_span_id), CLIENT[36..52]);
    let said = attributes(call);
    assert_eq!(said["gen_ai.request.stream"], Value::BoolValue(true));
    assert_eq!(said["gen_ai.response.finish_reasons"], texts(&["length"]));
    assert!(said["baton.prefill_node"] == text("prefill-0"), "of the only completion: {said:?}");
    for (name, span) in &spans {
        assert_eq!(hex(&span.trace_id), CLIENT[3..35], "{name}");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_with_several_completions_is_one_tree() {
    let (endpoint, mut received) = collector().await;
    let cluster = traced(endpoint).await;
    let body = json!({"messages": [{"role": "user", "content": "Hello there"}], "n": 2, "seed": 7,
        "top_k": 5, "temperature": 0.5, "max_tokens": 4, "ignore_eos": true});
    assert!(chat(&cluster, &body).await.starts_with("HTTP/1.1 200"));

    let mut wanted: BTreeMap<&str, usize> = BTreeMap::from([
        ("chat", 1),
        ("baton.completion", 2),
        ("baton.queue", 2),
        ("baton.prefill", 2),
        ("baton.decode", 2),
        ("baton.kv_transfer", 2),
    ]);
    let mut spans = Vec::new();
    while !wanted.is_empty() {
        let span = tokio::time::timeout(PATIENCE, received.recv()).await;
        let Ok(Some(span)) = span else { panic!("{wanted:?} are missing") };
        let name = span.name.split(' ').next().unwrap();
        let left = wanted.get_mut(name).unwrap_or_else(|| panic!("another {name}"));
        *left -= 1;
        wanted.retain(|_, left| *left > 0);
        spans.push(span);
    }
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let [call] = named("chat demo")[..] else { panic!("one call") };
    assert_eq!(
        (hex(&call.parent_span_id), call.kind()),
        (CLIENT[36..52].to_owned(), SpanKind::Server)
    );
    for span in &spans {
        assert_eq!(hex(&span.trace_id), CLIENT[3..35], "{}", span.name);
        let parent = spans.iter().find(|other| other.span_id == span.parent_span_id);
        let parent = parent.map(|parent| &*parent.name);
        let wanted = match &*span.name {
            "chat demo" => None,
            "baton.completion" => Some("chat demo"),
            "baton.kv_transfer" => Some("baton.prefill"),
            _ => Some("baton.completion"),
        };
        assert_eq!(parent, wanted, "{}", span.name);
    }
    for completion in named("baton.completion") {
        let below = spans.iter().filter(|span| span.parent_span_id == completion.span_id);
        assert_eq!(below.count(), 3, "queue, prefill and decode of each");
        let inside = call.start_time_unix_nano <= completion.start_time_unix_nano
            && completion.end_time_unix_nano <= call.end_time_unix_nano;
        assert!(inside, "{completion:?} is in {call:?}");
    }
    let said = attributes(call);
    let http = cluster.cluster.http();
    for (key, value) in [
        ("gen_ai.operation.name", text("chat")),
        ("gen_ai.provider.name", text("baton")),
        ("gen_ai.request.model", text("demo")),
        ("gen_ai.response.model", text("demo")),
        ("gen_ai.request.choice.count", Value::IntValue(2)),
        ("gen_ai.request.seed", Value::IntValue(7)),
        ("gen_ai.request.top_k", Value::IntValue(5)),
        ("gen_ai.request.temperature", Value::DoubleValue(0.5)),
        ("gen_ai.request.max_tokens", Value::IntValue(4)),
        ("gen_ai.request.stream", Value::BoolValue(false)),
        ("gen_ai.usage.output_tokens", Value::IntValue(8)),
        ("gen_ai.response.finish_reasons", texts(&["length", "length"])),
        ("server.address", text(&http.ip().to_string())),
        ("server.port", Value::IntValue(http.port().into())),
    ] {
        assert_eq!(said.get(key), Some(&value), "{key}");
    }
    assert!(said.contains_key("gen_ai.usage.input_tokens") && !said.contains_key("error.type"));
    assert!(said.contains_key("gen_ai.response.time_to_first_chunk"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_refused_says_what_kind_of_error_it_is() {
    let (endpoint, mut received) = collector().await;
    let cluster = traced(endpoint).await;
    let body = json!({"messages": [{"role": "user", "content": "Hello"}], "model": "gpt"});
    assert!(chat(&cluster, &body).await.starts_with("HTTP/1.1 404"));
    let span = tokio::time::timeout(PATIENCE, received.recv()).await.unwrap().unwrap();
    assert_eq!((&*span.name, hex(&span.trace_id)), ("chat", CLIENT[3..35].to_owned()));
    assert_eq!(attributes(&span)["error.type"], text("NotFound"));
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
