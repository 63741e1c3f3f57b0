//! What both ports say of themselves and of the cluster; the core is played by the test.

use axum::http::StatusCode;
use axum::http::uri::PathAndQuery;
use baton_proto::ids::RequestId;
use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::{
    GetCacheRequest, GetStatusRequest, ListNodesRequest, SetRoleRequest, TokenIds,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::client::Grpc;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

use super::details;
use super::fixtures::{Played, start, tokenizer};
use crate::history::FindError;
use crate::orders::OrderError;
use crate::testing::node;

#[tokio::test]
async fn operators_see_the_cluster() {
    let played = start(|_| panic!("no request")).await;
    let mut client = ClusterClient::new(played.channel());
    let status = client.get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.ready && status.version == super::VERSION);
    let nodes = client.list_nodes(ListNodesRequest {}).await.unwrap().into_inner().nodes;
    assert_eq!((nodes[0].id.as_str(), nodes[0].role.as_str()), ("d0", "decode"));
    let blocks = nodes[0].kv_blocks.unwrap();
    assert_eq!((blocks.free, blocks.active, blocks.cached, blocks.leased), (4, 3, 2, 1));
    assert_eq!((blocks.block_tokens, blocks.bytes_per_block), (4, 1024));

    let prefix = "The code of Kestrel is";
    let query = GetCacheRequest { prefix: Some(prefix.into()), ..Default::default() };
    let cache = client.get_cache(query).await.unwrap().into_inner();
    assert_eq!(cache.prefix_tokens as usize, tokenizer().encode(prefix, true).unwrap().len());
    for (node, code) in [("d1", Code::NotFound), ("D 1", Code::InvalidArgument)] {
        let query = GetCacheRequest { node: Some(node.into()), ..Default::default() };
        let error = client.get_cache(query).await.unwrap_err();
        assert_eq!(error.code(), code);
        let resource = error.get_details_resource_info().map(|info| info.resource_name);
        assert_eq!(resource, (code == Code::NotFound).then(|| "d1".to_owned()));
    }
}

#[test]
fn what_operators_name_wrongly_is_said_in_details() {
    let id = RequestId(0xabc);
    let unknown = details::not_found(&FindError::Unknown, "abc");
    assert_eq!(unknown.code(), Code::NotFound);
    let resource = unknown.get_details_resource_info().unwrap();
    assert_eq!((&*resource.resource_type, &*resource.resource_name), ("request", "abc"));
    let ambiguous = details::not_found(&FindError::Ambiguous, "a");
    assert_eq!(ambiguous.code(), Code::InvalidArgument);
    let fields = ambiguous.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "request_id");
    let ended = details::not_found(&FindError::Ended(id), "abc");
    let last = OrderError::LastDecode { node: node("d0"), model: "demo".to_owned() };
    for (status, kind, subject) in [
        (ended, "ENDED", id.to_string()),
        (details::not_ordered(&last), "LAST_DECODE", "d0".to_owned()),
    ] {
        assert_eq!(status.code(), Code::FailedPrecondition);
        let violations = status.get_details_precondition_failure().unwrap().violations;
        assert_eq!((&*violations[0].r#type, &violations[0].subject), (kind, &subject));
    }
    let nobody = OrderError::Unknown { node: node("d7"), hint: "there are none".to_owned() };
    let nobody = details::not_ordered(&nobody);
    assert_eq!(nobody.get_details_resource_info().unwrap().resource_name, "d7");
    for down in [
        details::not_found(&FindError::ShuttingDown, "abc"),
        details::not_ordered(&OrderError::ShuttingDown),
    ] {
        assert_eq!(down.code(), Code::Unavailable);
        assert!(down.get_details_retry_info().is_some(), "{down:?}");
    }
}

#[tokio::test]
async fn what_is_no_message_is_the_clients_fault() {
    let played = start(|_| panic!("no request")).await;
    // Read as a request, these ids are a model's name that is no text.
    let wrong = TokenIds { ids: vec![255] };
    for path in ["/baton.v1.Inference/Generate", "/baton.v1.Inference/Tokenize"] {
        let mut client = Grpc::new(played.channel());
        client.ready().await.unwrap();
        let (path, codec) = (PathAndQuery::from_static(path), ProstCodec::<_, ()>::default());
        let answer = client.unary(Request::new(wrong.clone()), path, codec).await;
        let error = answer.expect_err("no message");
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().starts_with("the request is no message"), "{error}");
    }
}

#[tokio::test]
async fn orders_name_a_node_and_a_role() {
    let played = start(|_| panic!("no request")).await;
    let mut client = ClusterClient::new(played.channel());
    let order = |node: &str, role: &str| SetRoleRequest {
        node: node.to_owned(),
        role: role.to_owned(),
        force: false,
    };
    assert!(client.set_role(order("d0", "prefill")).await.is_ok());
    for wrong in [order("D 0", "prefill"), order("d0", "both"), order("d0", "")] {
        let error = client.set_role(wrong).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
}

#[tokio::test]
async fn health_follows_readiness() {
    let played = start(|_| panic!("no request")).await;
    let mut health = HealthClient::new(played.channel());
    let ask = |service: &str| HealthCheckRequest { service: service.to_owned() };
    played.until_health("baton.v1.Inference", true).await;
    played.until_health("decode", true).await;
    played.set_ready(false);
    // The one that is told last.
    played.until_health("decode", false).await;
    for (service, status) in [
        ("", ServingStatus::NotServing),
        ("vllm.grpc.engine.VllmEngine", ServingStatus::NotServing),
        ("prefill", ServingStatus::NotServing),
        ("baton.v1.Cluster", ServingStatus::Serving),
    ] {
        let checked = health.check(ask(service)).await.unwrap().into_inner();
        assert_eq!(checked.status(), status, "{service}");
    }
}

/// What reflection has to list.
const SERVICES: [&str; 4] = [
    "baton.v1.Inference",
    "baton.v1.Cluster",
    "vllm.grpc.engine.VllmEngine",
    "grpc.health.v1.Health",
];

/// Both versions have the same messages, each as types of its own.
macro_rules! reflection_names_and_describes_the_services {
    ($test:ident, $version:ident) => {
        #[tokio::test]
        async fn $test() {
            use tonic_reflection::pb::$version::ServerReflectionRequest;
            use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
            use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;

            let played = start(|_| panic!("no request")).await;
            let mut reflection = ServerReflectionClient::new(played.channel());
            let symbols = SERVICES.map(|name| MessageRequest::FileContainingSymbol(name.into()));
            let asked = [MessageRequest::ListServices(String::new())].into_iter().chain(symbols);
            let asked = asked.map(|asked| ServerReflectionRequest {
                host: String::new(),
                message_request: Some(asked),
            });
            let asked = tokio_stream::iter(asked.collect::<Vec<_>>());
            let answers = reflection.server_reflection_info(asked).await.unwrap();
            let mut answers = answers.into_inner();
            let answer = answers.message().await.unwrap().unwrap().message_response;
            let Some(MessageResponse::ListServicesResponse(list)) = answer else {
                panic!("{answer:?}")
            };
            let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
            for name in SERVICES {
                assert!(names.iter().any(|listed| listed == name), "{names:?}");
                let answer = answers.message().await.unwrap().unwrap().message_response;
                let described = matches!(answer, Some(MessageResponse::FileDescriptorResponse(_)));
                assert!(described, "{name}: {answer:?}");
            }
        }
    };
}

reflection_names_and_describes_the_services!(reflection_v1_describes_the_services, v1);
reflection_names_and_describes_the_services!(reflection_v1alpha_describes_the_services, v1alpha);

async fn get(played: &Played, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(played.http).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn http_says_whether_it_would_serve() {
    let played = start(|_| panic!("no request")).await;
    let ok = StatusCode::OK.as_u16();
    assert_eq!(get(&played, "/health").await, (ok, "ready\n".to_owned()));
    let (code, models) = get(&played, "/v1/models").await;
    let models: serde_json::Value = serde_json::from_str(&models).unwrap();
    assert_eq!((code, &models["data"][0]["id"]), (ok, &"demo".into()));
    played.set_ready(false);
    let expected = (503, "not ready: no decode node\n".to_owned());
    assert_eq!(get(&played, "/health").await, expected);
    let (_, models) = get(&played, "/v1/models").await;
    assert!(!models.contains("demo"), "a model that cannot be used now is not listed");
    assert_eq!(get(&played, "/live").await.0, ok);
    assert!(get(&played, "/version").await.1.contains(super::VERSION));
    assert_eq!(get(&played, "/metrics").await.0, ok);
    assert_eq!(get(&played, "/nothing").await.0, 404);
}

#[test]
fn plaintext_stays_on_this_machine_unless_allowed() {
    for (address, fine) in [
        ("127.0.0.1:1", true),
        ("[::1]:1", true),
        ("[::ffff:127.0.0.1]:1", true),
        ("0.0.0.0:1", false),
        ("[::]:1", false),
        ("10.0.0.1:1", false),
    ] {
        let address = address.parse().unwrap();
        assert_eq!(super::check_plaintext(address, false).is_ok(), fine, "{address}");
        assert!(super::check_plaintext(address, true).is_ok());
    }
}
