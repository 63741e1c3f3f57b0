//! Operators look at requests, end them, and are told what happens.

use std::process::{Command, Output};

use baton_proto::wire::v1::{
    CancelRequest, DrainRequest, Event, ExplainRequest, GenerateRequest, ListRequestsRequest,
    RequestInfo, WatchRequest, WatchResponse,
};
use baton_tests::{Chance, PATIENCE, TestCluster, daemons, options, request};
use tonic::{Code, Streaming};

fn baton(cluster: &TestCluster, arguments: &[&str]) -> Output {
    let coordinator = cluster.cluster.grpc().to_string();
    let mut command = Command::new(daemons().join("baton"));
    command.args(arguments).args(["--coordinator", &coordinator]).output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

async fn list(cluster: &TestCluster, active: bool) -> Vec<RequestInfo> {
    let request = ListRequestsRequest { active, limit: None };
    cluster.operator().list_requests(request).await.unwrap().into_inner().requests
}

async fn events(cluster: &TestCluster, after: u64) -> Vec<Event> {
    let request = WatchRequest { after: Some(after), until_now: true };
    let mut stream = cluster.operator().watch(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        assert_eq!(message.missed, 0);
        events.extend(message.events);
    }
    events
}

/// The next event of this kind.
async fn next(stream: &mut Streaming<WatchResponse>, kind: &str) -> Event {
    let found = async {
        loop {
            let message = stream.message().await.unwrap().expect("it goes on");
            if let Some(event) = message.events.into_iter().find(|event| event.kind == kind) {
                return event;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("it is told")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_request_is_seen_explained_and_cancelled() {
    let (cluster, _folder) = TestCluster::start_slow(1, 1, 800).await;
    let mut wanted = request(Chance(1).tokens(2000), 6000);
    (wanted.tenant, wanted.priority) = ("acme".to_owned(), "batch".to_owned());
    let mut stream = cluster.generate(wanted).await.unwrap();

    let running = list(&cluster, true).await;
    assert_eq!(running.len(), 1, "{running:?}");
    let seen = &running[0];
    assert_eq!((&*seen.tenant, &*seen.priority), ("acme", "batch"));
    assert_eq!((seen.usage.unwrap().prompt_tokens, seen.ended_ms), (2000, None));

    let request_id = seen.id[..8].to_owned();
    let explained = cluster.operator().explain(ExplainRequest { request_id }).await.unwrap();
    let explained = explained.into_inner();
    assert_eq!(explained.request.unwrap().id, seen.id);
    let decision = explained.decision.unwrap();
    assert_eq!((decision.prefill_nodes_compared, decision.decode_nodes_compared), (1, 1));
    let chosen = &decision.candidates[0];
    assert_eq!((&*chosen.prefill_node, &*chosen.decode_node), ("prefill-0", "decode-0"));
    for candidate in &decision.candidates {
        let cost = candidate.cost.unwrap();
        let sum = cost.queue_ms + cost.pull_ms + cost.prefill_ms;
        let sum = sum + cost.transfer_ms + cost.decode_ms + cost.harm_ms;
        assert!((sum - cost.total_ms).abs() < 1e-6 * sum, "{cost:?}");
    }

    let output = baton(&cluster, &["cancel", &seen.id[..12]]);
    assert_eq!(text(output.stdout), format!("{} is cancelled\n", seen.id));
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it was cancelled"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::Cancelled, "{ended}");
    cluster.idle().await;
    let after = list(&cluster, false).await;
    assert_eq!((&*after[0].id, &*after[0].phase), (&*seen.id, "cancelled"));
    let again = cluster.operator().cancel(CancelRequest { request_id: seen.id.clone() }).await;
    assert_eq!(again.unwrap_err().code(), Code::FailedPrecondition);
    let told = events(&cluster, 0).await;
    let cancelled = told.iter().find(|event| event.kind == "request_cancelled").unwrap();
    assert_eq!(cancelled.request_id, seen.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_is_told_in_order_and_can_be_gone_on_with() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let past = events(&cluster, 0).await;
    let joined: Vec<&str> =
        past.iter().filter(|e| e.kind == "node_joined").map(|event| event.node.as_str()).collect();
    assert!(joined.contains(&"prefill-0") && joined.contains(&"decode-0"), "{past:?}");
    let numbers: Vec<u64> = past.iter().map(|event| event.sequence).collect();
    assert_eq!(numbers, (1..=past.len() as u64).collect::<Vec<_>>());
    assert_eq!(events(&cluster, 1).await.first(), past.get(1));

    let from_now = WatchRequest { after: Some(past.len() as u64), until_now: false };
    let mut news = cluster.operator().watch(from_now).await.unwrap().into_inner();
    let drain = |node: &str, undo| DrainRequest { node: node.to_owned(), undo, force: true };
    cluster.operator().drain(drain("prefill-0", false)).await.unwrap();
    assert_eq!(next(&mut news, "node_draining").await.node, "prefill-0");
    cluster.operator().drain(drain("decode-0", false)).await.unwrap();
    assert_eq!(next(&mut news, "node_draining").await.node, "decode-0");

    // Nobody takes work: what is refused is told, remembered and explained.
    let refused = cluster.complete(request(vec![20, 21], 2)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_eq!(next(&mut news, "requests_refused").await.count, 1);
    let remembered = list(&cluster, false).await;
    assert_eq!(remembered[0].phase, "refused");
    let output = baton(&cluster, &["explain", &remembered[0].id[..10]]);
    let shown = text(output.stdout);
    assert!(shown.contains("no node could take it"), "{shown}");
    let status = baton(&cluster, &["status", "--exit-code"]);
    let shown = text(status.stdout);
    assert_eq!(status.status.code(), Some(5), "{shown}");
    assert!(shown.starts_with("not ready: every decode node is draining\n"), "{shown}");
    assert!(shown.contains("\ncritical  NOT_READY: "), "{shown}");

    assert!(cluster.cluster.kill("prefill-0"));
    assert_eq!(next(&mut news, "node_left").await.node, "prefill-0");
    let status = text(baton(&cluster, &["status"]).stdout);
    assert!(status.contains("NODE_LOST: prefill-0 left"), "{status}");
    let log = text(baton(&cluster, &["events"]).stdout);
    assert!(log.lines().last().unwrap().ends_with("node_left          prefill-0 left"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_can_be_looked_at_in_every_way() {
    let mut wanted = options(1, 1);
    wanted.local_prefill = Some("never".into());
    let cluster = TestCluster::start(wanted).await;
    let asked = GenerateRequest { n: Some(2), ..request(Chance(3).tokens(200), 5) };
    cluster.complete(asked).await.unwrap();
    cluster.idle().await;

    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = baton(&cluster, arguments);
        assert!(output.status.success(), "{}", text(output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let listed = json(&["requests", "-o", "json"]);
    let requests = listed["requests"].as_array().unwrap();
    assert_eq!((requests.len(), listed["active"].as_u64()), (2, Some(0)), "{listed}");
    let id = requests[0]["id"].as_str().unwrap();
    let explained = json(&["explain", id, "--json"]);
    assert_eq!(explained["request"]["phase"], "finished");
    for time in ["prefill_ms", "ttft_ms", "total_ms", "transfer_bytes"] {
        assert!(explained["request"]["timings"][time].as_f64().unwrap() > 0.0, "{explained}");
    }
    let shown = text(baton(&cluster, &["explain", id]).stdout);
    assert!(shown.contains("\nwhy       remote: "), "{shown}");
    assert!(shown.contains("PREDICTED"), "{shown}");

    let status = json(&["status", "--json"]);
    assert_eq!(status["tokens"]["prompt"], 400, "{status}");
    assert_eq!(status["tokens"]["generated"], 10, "{status}");
    assert_eq!(status["recent"]["requests"], 2, "{status}");
    let cache = json(&["cache", "--json"]);
    let computed: u64 = cache["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n["prompt_tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(computed, 400, "{cache}");

    let code = |arguments: &[&str]| baton(&cluster, arguments).status.code();
    assert_eq!(code(&["status", "--exit-code"]), Some(0));
    assert_eq!(code(&["explain", "00000000000000000000000000000000"]), Some(3));
    assert_eq!(code(&["cancel", "not an id"]), Some(1));
    assert_eq!(code(&["requests", "--limit", "0"]), Some(2));
    let nobody = Command::new(daemons().join("baton"))
        .args(["status", "--coordinator", "127.0.0.1:1"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(4));
    let said = text(nobody.stderr);
    assert!(said.starts_with("baton: no coordinator answers at 127.0.0.1:1 ("), "{said}");
}
