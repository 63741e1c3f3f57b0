//! Bodies of requests, and what follows from a request's name.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use baton_proto::wire::v1::inference_client::InferenceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::client::GrpcService;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::Entrance;
use super::scope::Scope;
use super::tests::{Keys, answer, behind, http, prompt, start};
use crate::core::{NewRequest, Update};
use crate::front::MAX_BODY_BYTES;
use crate::front::fixtures::{Play, in_time, output, until};

#[tokio::test]
async fn a_body_has_a_limit_and_its_request_a_name() {
    let played = start(Entrance::open(), answer).await;
    let (status, answer) =
        http(&played, "POST /v1/x HTTP/1.1\r\ncontent-length: 99999999", b"").await;
    assert_eq!(status, 413, "{answer}");
    assert!(answer.contains("the body has more than 16777216 bytes"), "{answer}");
    let mut chunks = b"1000000\r\n".to_vec();
    chunks.resize(chunks.len() + 0x0100_0000, b'x');
    chunks.extend(b"\r\n1\r\nx\r\n0\r\n\r\n");
    let head = "POST /v1/x HTTP/1.1\r\ntransfer-encoding: chunked\r\nx-request-id: mine-7";
    let (status, answer) = http(&played, head, &chunks).await;
    assert_eq!(status, 413, "{answer}");
    assert!(answer.contains("x-request-id: mine-7"), "{answer}");
}

#[tokio::test]
async fn refusals_have_the_shape_of_the_api() {
    let mut keys = Keys::new();
    let key = keys.add("app", "acme", &[Scope::Generate], "");
    let played = start(behind(&keys.path()), answer).await;
    for (length, status, code, kind) in [
        (2, 401, "invalid_api_key", "authentication_error"),
        (MAX_BODY_BYTES + 1, 413, "request_too_large", "request_too_large"),
    ] {
        let key = if status == 401 { "" } else { &*key };
        for path in ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"] {
            let head = format!(
                "POST {path} HTTP/1.1\r\nauthorization: Bearer {key}\r\ncontent-length: {length}"
            );
            let (got, answer) = http(&played, &head, b"{}").await;
            assert_eq!(got, status, "{answer}");
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            match path.starts_with("/v1/messages") {
                true => assert_eq!(
                    (&body["type"], &body["error"]["type"]),
                    (&"error".into(), &kind.into())
                ),
                false => assert_eq!(body["error"]["code"], code),
            }
            let asked = answer.to_lowercase().contains("www-authenticate: bearer");
            assert_eq!(asked, status == 401, "{answer}");
        }
    }
}

#[tokio::test]
async fn bodies_of_all_requests_have_a_limit_together() {
    let played = start(Entrance::open().with_bodies(1000), answer).await;
    let mut first = TcpStream::connect(played.http).await.unwrap();
    first.write_all(&begins(900)).await.unwrap();
    // When it is asked to go on, its body is being read.
    first.read_exact(&mut [0; 25]).await.unwrap();

    let post = "POST /v1/messages HTTP/1.1\r\ncontent-length: 200";
    let (status, answer) = http(&played, post, &[b' '; 200]).await;
    assert_ne!(status, 503, "what has not arrived takes nothing: {answer}");
    first.write_all(&[b' '; 899]).await.unwrap();
    let refused = until(async || {
        let (status, answer) = http(&played, post, &[b' '; 200]).await;
        (status == 503).then_some(answer)
    });
    let refused = refused.await;
    assert!(
        refused.contains("retry-after: 1\r\n") && refused.contains("too many bodies"),
        "{refused}"
    );
    assert!(refused.contains("\"type\":\"api_error\""), "{refused}");
    let mut client = InferenceClient::new(played.channel());
    let long = client.generate(prompt(&"x".repeat(200))).await.unwrap_err();
    assert_eq!(long.code(), Code::Unavailable, "{long:?}");
    assert!(long.get_details_retry_info().is_some(), "{long:?}");
    assert!(client.generate(prompt("Hello")).await.is_ok(), "there is room for a short one");

    drop(first);
    until(async || (http(&played, post, &[b' '; 200]).await.0 != 503).then_some(())).await;
    let head = "POST /v1/messages HTTP/1.1\r\ncontent-length: 1001";
    assert_eq!(http(&played, head, &[b' '; 1001]).await.0, 503, "it never has room");
}

/// The head of a request that waits to be asked for its body.
fn begins(length: usize) -> Vec<u8> {
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json";
    format!("{head}\r\ncontent-length: {length}\r\nexpect: 100-continue\r\n\r\n").into()
}

#[tokio::test]
async fn bodies_that_nobody_reads_are_not_waited_for() {
    let mut keys = Keys::new();
    let key = keys.add("app", "acme", &[Scope::Generate], "");
    let mut entrance = behind(&keys.path()).with_bodies(1000);
    entrance.patience.body = Duration::from_millis(5);
    let played = start(entrance, answer).await;
    for (head, status) in [
        ("POST /health HTTP/1.1\r\ncontent-length: 900".to_owned(), 405),
        ("GET /live HTTP/1.1\r\ncontent-length: 1001".to_owned(), 200),
        (format!("GET /v1/models HTTP/1.1\r\ncontent-length: 9\r\nx-api-key: {key}"), 200),
        (format!("POST /v1/messages HTTP/1.1\r\ncontent-length: 9\r\nx-api-key: {key}"), 408),
    ] {
        let (got, answer) = http(&played, &head, b"").await;
        assert_eq!(got, status, "{head}: {answer}");
    }
}

#[tokio::test]
async fn a_calls_message_must_arrive_in_time() {
    let mut entrance = Entrance::open();
    entrance.patience.body = Duration::from_millis(5);
    let played = start(entrance, answer).await;
    let never = tonic::body::Body::new(Body::from_stream(tokio_stream::pending::<
        Result<Bytes, Infallible>,
    >()));
    let call = axum::http::Request::post("/baton.v1.Inference/Tokenize")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(never)
        .unwrap();
    let mut channel = played.channel();
    std::future::poll_fn(|cx| GrpcService::poll_ready(&mut channel, cx)).await.unwrap();
    let answer = in_time(GrpcService::call(&mut channel, call)).await.unwrap();
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert_eq!(status.message(), "the body did not arrive within 0.005 s");
}

#[tokio::test]
async fn a_request_that_is_sent_again_is_not_computed_twice_at_a_time() {
    let begins = |_: &NewRequest| Play::Silence(vec![Update::Tokens(vec![output(20, None)])]);
    let played = start(Entrance::open(), begins).await;
    let head = |id: &str, length: usize| {
        format!(
            "POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n\
             idempotency-key: {id}\r\nx-request-id: of-many\r\ncontent-length: {length}"
        )
    };
    let body = br#"{"prompt": "Hello", "stream": true}"#;
    let mut first = TcpStream::connect(played.http).await.unwrap();
    first
        .write_all(format!("{}\r\nhost: x\r\n\r\n", head("r-1", body.len())).as_bytes())
        .await
        .unwrap();
    first.write_all(body).await.unwrap();
    first.read_exact(&mut [0; 12]).await.unwrap();

    let (status, again) = http(&played, &head("r-1", body.len()), body).await;
    assert_eq!(status, 409, "{again}");
    for said in [
        "duplicate_request",
        "retry-after: 1\r\n",
        "x-should-retry: true",
        r#"\"r-1\""#,
        "x-request-id: of-many",
    ] {
        assert!(again.contains(said), "{said}: {again}");
    }
    assert_eq!(played.asked().len(), 1);
    drop(first);
    assert_eq!(played.dropped().await, played.asked()[0].id);
    // Its end frees the name.
    let second = until(async || {
        let mut second = TcpStream::connect(played.http).await.unwrap();
        let ask = format!("{}\r\nhost: x\r\n\r\n", head("r-1", body.len()));
        second.write_all(&[ask.as_bytes(), body].concat()).await.unwrap();
        let mut status = [0; 12];
        second.read_exact(&mut status).await.unwrap();
        let said = String::from_utf8_lossy(&status);
        assert!(said.ends_with("200") || said.ends_with("409"), "{said}");
        said.ends_with("200").then_some(second)
    });
    let _second = second.await;
    // Without a name it is another request, whatever the id that services pass on.
    let mut third = TcpStream::connect(played.http).await.unwrap();
    let ask = head("r-1", body.len()).replace("idempotency-key", "unheard-of");
    let ask = format!("{ask}\r\nhost: x\r\n\r\n");
    third.write_all(&[ask.as_bytes(), body].concat()).await.unwrap();
    let mut status = [0; 12];
    third.read_exact(&mut status).await.unwrap();
    assert!(status.ends_with(b"200"), "{}", String::from_utf8_lossy(&status));
    let (status, said) = http(&played, &head("r 1", body.len()), body).await;
    assert_eq!(status, 400, "{said}");
    assert!(said.contains("idempotency-key must be 1 to 256 visible ASCII characters"), "{said}");
}
