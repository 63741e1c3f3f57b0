//! Clients with and without keys, in a hurry and slow, before a front whose core is played.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_proto::hash::CacheSalt;
use baton_proto::message::NodeFinish;
use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::embed_input::Input as Text;
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::inference_client::InferenceClient;
use baton_proto::wire::v1::{
    DrainRequest, EmbedInput, EmbedRequest, GenerateRequest, GenerateResponse, GetCacheRequest,
    GetStatusRequest, ListNodesRequest, TokenIds,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use super::entrance::Patience;
use super::keys::NewKey;
use super::scope::Scope;
use super::{Door, Entrance, MAX_CONNECTIONS};
use crate::core::{NewRequest, SubmitError, Update};
use crate::front::fixtures::{Play, Played, demo_model, output, start_behind, until};
use crate::placement::TenantId;

/// A file of keys, and the keys.
pub(super) struct Keys {
    folder: tempfile::TempDir,
    entries: String,
}

impl Keys {
    pub(super) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), entries: String::new() }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.path().join("keys.toml")
    }

    /// Makes a key of that name; `limits` are lines of its entry.
    pub(super) fn add(
        &mut self,
        name: &str,
        tenant: &str,
        scopes: &[Scope],
        limits: &str,
    ) -> String {
        let random = std::array::from_fn(|at| name.as_bytes()[at % name.len()]);
        let key = NewKey::of(random, name, tenant, scopes).unwrap();
        self.entries += &format!("{}{limits}\n", key.entry);
        std::fs::write(self.path(), &self.entries).unwrap();
        key.secret
    }
}

pub(super) fn behind(keys: &Path) -> Entrance {
    Entrance::new(Door::new(Some(keys.to_owned())).unwrap(), None, MAX_CONNECTIONS)
}

pub(super) async fn start(
    entrance: Entrance,
    play: impl Fn(&NewRequest) -> Play + Send + 'static,
) -> Played {
    start_behind(entrance, &demo_model(), &["demo"], Vec::new(), play).await
}

pub(super) fn answer(_: &NewRequest) -> Play {
    Play::Accept(vec![Update::Tokens(vec![output(20, Some(NodeFinish::Length))])])
}

fn with_key<T>(key: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

pub(super) fn prompt(text: &str) -> GenerateRequest {
    GenerateRequest { input: Some(Input::Prompt(text.into())), ..GenerateRequest::default() }
}

async fn generate(played: &Played, key: &str) -> Result<Vec<GenerateResponse>, Status> {
    let mut client = InferenceClient::new(played.channel());
    let mut stream = client.generate(with_key(key, prompt("Hello"))).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

/// Sends `head` and `body` over HTTP; status and all of the answer.
pub(super) async fn http(played: &Played, head: &str, body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(played.http).await.unwrap();
    let head = format!("{head}\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    // Whoever is refused need not be heard out.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    (answer.get(9..12).unwrap_or("0").parse().unwrap(), answer)
}

#[tokio::test]
async fn a_key_opens_what_its_scopes_name() {
    let mut keys = Keys::new();
    let app = keys.add("app", "acme", &[Scope::Generate], "");
    let viewer = keys.add("viewer", "ops", &[Scope::View], "");
    let operator = keys.add("operator", "ops", &Scope::ALL, "");
    let played = start(behind(&keys.path()), answer).await;

    for key in ["", "x", &app[1..]] {
        assert_eq!(generate(&played, key).await.unwrap_err().code(), Code::Unauthenticated);
    }
    assert_eq!(generate(&played, &viewer).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(generate(&played, &app).await.unwrap().len(), 2);
    let mut cluster = ClusterClient::new(played.channel());
    let denied = cluster.get_status(with_key(&app, GetStatusRequest {})).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert_eq!(denied.message(), "key \"app\" has no scope \"view\", which this needs");
    cluster.list_nodes(with_key(&viewer, ListNodesRequest {})).await.unwrap();
    let drain = || DrainRequest { node: "d0".to_owned(), ..DrainRequest::default() };
    let denied = cluster.drain(with_key(&viewer, drain())).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    cluster.drain(with_key(&operator, drain())).await.unwrap();
    let unheard = cluster.list_nodes(ListNodesRequest {}).await.unwrap_err();
    assert_eq!(unheard.code(), Code::Unauthenticated);
    HealthClient::new(played.channel()).check(HealthCheckRequest::default()).await.unwrap();

    for (head, status) in [
        ("GET /health HTTP/1.1".to_owned(), 200),
        ("GET /live HTTP/1.1".to_owned(), 200),
        ("GET /version HTTP/1.1".to_owned(), 401),
        ("GET /nothing HTTP/1.1".to_owned(), 401),
        ("GET /version HTTP/1.1\r\nauthorization: Bearer ".to_owned(), 401),
        (format!("GET /version HTTP/1.1\r\nauthorization: bearer {app}"), 200),
        (format!("GET /v1/models HTTP/1.1\r\nx-api-key: {app}"), 200),
        (format!("GET /metrics HTTP/1.1\r\nx-api-key: {app}"), 403),
        (format!("GET /metrics HTTP/1.1\r\nx-api-key: {viewer}"), 200),
        (format!("GET /nothing HTTP/1.1\r\nx-api-key: {viewer}"), 404),
        (format!("POST /v1/chat/completions HTTP/1.1\r\nx-api-key: {viewer}"), 403),
    ] {
        let (got, answer) = http(&played, &head, b"").await;
        assert_eq!(got, status, "{head}: {answer}");
        assert!(!answer.contains(&app), "a secret came back");
    }
}

#[tokio::test]
async fn without_keys_an_empty_one_is_fine() {
    let played = start(Entrance::open(), answer).await;
    for key in ["", "anything"] {
        assert!(generate(&played, key).await.is_ok());
    }
    let (status, _) = http(&played, "GET /version HTTP/1.1\r\nauthorization: Bearer ", b"").await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_key_decides_whose_requests_they_are() {
    let mut keys = Keys::new();
    let [acme, other] = ["acme", "other"].map(|name| keys.add(name, name, &[Scope::Generate], ""));
    let played = start(behind(&keys.path()), answer).await;
    let mut client = InferenceClient::new(played.channel());
    // Each asks in the other's name, and with a salt that might be the other's.
    for (key, tenant, salt) in [
        (&acme, "other", None),
        (&other, "acme", None),
        (&acme, "", Some("other")),
        (&other, "", Some("acme")),
    ] {
        let request = GenerateRequest {
            tenant: tenant.to_owned(),
            cache_salt: salt.map(str::to_owned),
            ..prompt("Hello")
        };
        client.generate(with_key(key, request)).await.unwrap();
    }
    let asked = played.asked();
    let tenants: Vec<_> = asked.iter().map(|request| request.standing.tenant).collect();
    let [a, o] = ["acme", "other"].map(TenantId::named);
    assert_eq!(tenants, [a, o, a, o]);
    assert_eq!(asked[0].salt, CacheSalt::of(Some("acme"), None));
    for (at, one) in asked.iter().enumerate() {
        assert!(asked[at + 1..].iter().all(|other| one.salt != other.salt));
    }
}

#[tokio::test]
async fn who_may_only_look_sees_no_other_tenants_cache() {
    let mut keys = Keys::new();
    let viewer = keys.add("viewer", "acme", &[Scope::View], "");
    let operator = keys.add("operator", "acme", &[Scope::View, Scope::Operate], "");
    let played = start(behind(&keys.path()), answer).await;
    let mut client = ClusterClient::new(played.channel());
    let acme = Some("acme");
    for (key, tenant, allowed) in [
        (&viewer, None, true),
        (&viewer, acme, true),
        (&viewer, Some("other"), false),
        (&viewer, Some(""), false),
        (&operator, Some("other"), true),
    ] {
        let prefix = Some("Hello".to_owned());
        let tenant = tenant.map(str::to_owned);
        let query = GetCacheRequest { prefix, tenant: tenant.clone(), ..Default::default() };
        let code = client.get_cache(with_key(key, query)).await.map_err(|error| error.code());
        let wanted = if allowed { Ok(()) } else { Err(Code::PermissionDenied) };
        assert_eq!(code.map(drop), wanted, "{tenant:?}");
    }
}

#[tokio::test]
async fn what_is_over_the_quota_is_refused_before_the_core_hears_of_it() {
    let mut keys = Keys::new();
    let busy = keys.add("busy", "acme", &[Scope::Generate], "max_in_flight = 1");
    let small = keys.add("small", "acme", &[Scope::Generate], "tokens_per_minute = 2");
    let few = keys.add("few", "acme", &[Scope::Generate], "requests_per_minute = 1");
    let silent = |_: &NewRequest| Play::Silence(Vec::new());
    let played = start(behind(&keys.path()), silent).await;
    let mut client = InferenceClient::new(played.channel());
    for (name, key, what) in [
        ("busy", &busy, "key \"busy\" may use 1 requests at a time"),
        // Each passes with a full bucket, and leaves a debt.
        ("small", &small, "key \"small\" may use 2 tokens a minute"),
        ("few", &few, "key \"few\" may use 1 requests a minute"),
    ] {
        let before = played.asked().len();
        let running = client.generate(with_key(key, prompt("Hello there"))).await.unwrap();
        let refused = client.generate(with_key(key, prompt("Hello"))).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().starts_with(what), "{refused}");
        assert!(refused.metadata().contains_key("retry-after-ms"), "{refused:?}");
        assert!(refused.get_details_retry_info().unwrap().retry_delay.is_some(), "{refused:?}");
        let violations = refused.get_details_quota_failure().unwrap().violations;
        assert_eq!((violations.len(), &violations[0].subject), (1, &format!("key:{name}")));
        assert_eq!(violations[0].description, refused.message());
        assert_eq!(played.asked().len(), before + 1);
        drop(running);
    }
    // The place of a request whose client has left is free as soon as that is noticed.
    until(async || match client.generate(with_key(&busy, prompt("Hello"))).await {
        Ok(_) => Some(()),
        Err(refused) => {
            assert_eq!(refused.code(), Code::ResourceExhausted);
            None
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_core_refuses_is_charged_to_nobody() {
    let mut keys = Keys::new();
    let limits = "requests_per_minute = 1\ntokens_per_minute = 2";
    let few = keys.add("few", "acme", &[Scope::Generate], limits);
    let full = AtomicBool::new(true);
    let full_once = move |request: &NewRequest| match full.swap(false, Ordering::Relaxed) {
        true => Play::Refuse(SubmitError::NoNodes("demo".to_owned())),
        false => answer(request),
    };
    let played = start(behind(&keys.path()), full_once).await;
    assert_eq!(generate(&played, &few).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(generate(&played, &few).await.unwrap().len(), 2);
    assert_eq!(generate(&played, &few).await.unwrap_err().code(), Code::ResourceExhausted);
}

/// Nodes may have computed the part of a call that was accepted.
#[tokio::test]
async fn a_call_that_is_refused_in_part_is_charged() {
    let mut keys = Keys::new();
    let few = keys.add("few", "acme", &[Scope::Generate], "requests_per_minute = 1");
    let full = AtomicBool::new(false);
    let then_full = move |_: &NewRequest| match full.swap(true, Ordering::Relaxed) {
        true => Play::Refuse(SubmitError::NoNodes("demo".to_owned())),
        false => Play::Silence(Vec::new()),
    };
    let played = start(behind(&keys.path()), then_full).await;
    let mut client = InferenceClient::new(played.channel());
    for code in [Code::Unavailable, Code::ResourceExhausted] {
        let twice = GenerateRequest { n: Some(2), ..prompt("Hello") };
        let refused = client.generate(with_key(&few, twice)).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
    }
}

#[tokio::test]
async fn inputs_that_the_core_refuses_are_charged_to_nobody() {
    let mut keys = Keys::new();
    let few = keys.add("few", "acme", &[Scope::Generate], "tokens_per_minute = 3");
    let full = AtomicBool::new(true);
    let full_once = move |_: &NewRequest| match full.swap(false, Ordering::Relaxed) {
        true => Play::Refuse(SubmitError::NoNodes("demo".to_owned())),
        false => Play::Accept(vec![Update::Embedding(vec![1.0])]),
    };
    let played = start(behind(&keys.path()), full_once).await;
    let mut client = InferenceClient::new(played.channel());
    let ids =
        |ids: &[u32]| EmbedInput { input: Some(Text::TokenIds(TokenIds { ids: ids.to_vec() })) };
    for code in [Some(Code::Unavailable), None, Some(Code::ResourceExhausted)] {
        let inputs = vec![ids(&[7, 8, 9])];
        let asked = with_key(&few, EmbedRequest { inputs, ..EmbedRequest::default() });
        assert_eq!(client.embed(asked).await.err().map(|refused| refused.code()), code);
    }
}

#[tokio::test]
async fn keys_are_read_again_and_a_bad_file_changes_nothing() {
    let mut keys = Keys::new();
    let old = keys.add("old", "acme", &[Scope::Generate], "");
    let entrance = behind(&keys.path());
    let played = start(entrance.clone(), answer).await;
    assert!(generate(&played, &old).await.is_ok());
    keys.entries.clear();
    let new = keys.add("new", "acme", &[Scope::Generate], "");
    entrance.reload();
    assert!(generate(&played, &old).await.is_err());
    assert!(generate(&played, &new).await.is_ok());
    std::fs::write(keys.path(), "[[keys]]\nname = 'x'").unwrap();
    assert!(entrance.door.reload().is_err());
    entrance.reload();
    assert!(generate(&played, &new).await.is_ok());
}

#[tokio::test]
async fn who_says_nothing_is_not_waited_for() {
    let short = Duration::from_millis(5);
    let patience = Patience { greeting: short, headers: short, body: short, ..Patience::default() };
    let mut entrance = Entrance::open();
    entrance.patience = patience;
    let played = start(entrance, answer).await;
    for (address, said) in [
        (played.grpc, &b""[..]),
        (played.grpc, b"PRI * HTTP/2.0"),
        (played.http, b""),
        (played.http, b"GET /health"),
        (played.http, b"GET /health HTTP/1.1\r\nhost: x\r\n"),
        (played.http, b"POST /v1/x HTTP/1.1\r\ncontent-length: 5\r\n\r\n{"),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(said).await.unwrap();
        let mut heard = Vec::new();
        // An end, or an error: what counts is that it comes.
        let _ = stream.read_to_end(&mut heard).await;
        if said.starts_with(b"POST") {
            let heard = String::from_utf8(heard).unwrap();
            assert!(heard.starts_with("HTTP/1.1 408"), "{heard}");
        }
    }
}

#[tokio::test]
async fn one_address_cannot_take_all_connections() {
    let played = start(Entrance::new(Door::default(), None, 4), answer).await;
    let mut first = TcpStream::connect(played.http).await.unwrap();
    let mut second = TcpStream::connect(played.grpc).await.unwrap();
    let mut third = TcpStream::connect(played.http).await.unwrap();
    assert_eq!(third.read(&mut [0; 1]).await.unwrap_or(0), 0, "it is closed at once");
    for stream in [&mut first, &mut second] {
        let mut byte = [0; 1];
        let quiet = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut byte)).await;
        assert!(quiet.map_or(true, |read| read.is_ok_and(|bytes| bytes > 0)), "these go on");
    }
}

#[tokio::test]
async fn a_coordinator_that_drains_says_so_and_finishes_what_runs() {
    let silent = |_: &NewRequest| Play::UntilStopped(vec![Update::Tokens(vec![output(20, None)])]);
    let played = start(Entrance::open(), silent).await;
    for service in ["", "baton.v1.Inference", "decode"] {
        played.until_health(service, true).await;
    }
    let mut client = InferenceClient::new(played.channel());
    let mut stream = client.generate(prompt("Hello")).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let front = played.front.clone();
    let drained = tokio::spawn(async move { front.drain().await });
    for service in ["", "baton.v1.Inference", "decode"] {
        played.until_health(service, false).await;
    }
    played.until_health("baton.v1.Cluster", true).await;
    let refused = client.generate(prompt("Hello")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(http(&played, "GET /health HTTP/1.1", b"").await.0, 503);
    assert_eq!(http(&played, "GET /live HTTP/1.1", b"").await.0, 200);
    assert!(!drained.is_finished());
    played.front.core.stop(played.asked()[0].id).await;
    assert!(stream.message().await.unwrap().unwrap().finished.is_some());
    drained.await.unwrap();
}
