//! Operators change what nodes do while requests run: none of them notices.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{GetCacheRequest, GetStatusRequest, Placement};
use baton_tests::{Answer, Chance, PATIENCE, TestCluster, daemons, options, request};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

const WORKERS: usize = 8;
const PROMPTS: usize = 24;
const TOKENS: u32 = 40;

fn prompt(number: usize) -> Vec<u32> {
    Chance(number as u64).tokens(40 + 10 * number)
}

/// A request that was served.
struct Served {
    begun: Instant,
    placement: Placement,
}

/// A cluster under load, and what its requests should say.
struct Load {
    cluster: Arc<TestCluster>,
    expected: Vec<Vec<u32>>,
    served: mpsc::UnboundedReceiver<(usize, Instant, Answer)>,
    stop: watch::Sender<bool>,
    workers: JoinSet<()>,
}

impl Load {
    fn start(cluster: TestCluster, expected: Vec<Vec<u32>>) -> Self {
        let (cluster, mut workers) = (Arc::new(cluster), JoinSet::new());
        let (say, served) = mpsc::unbounded_channel();
        let (stop, stopped) = watch::channel(false);
        for worker in 0..WORKERS {
            let (cluster, say, stopped) = (Arc::clone(&cluster), say.clone(), stopped.clone());
            workers.spawn(async move {
                let mut client = cluster.inference_at(worker % 2);
                for count in worker.. {
                    if *stopped.borrow() {
                        return;
                    }
                    let number = count % PROMPTS;
                    let mut wanted = request(prompt(number), TOKENS);
                    // No node has an advantage by what it has cached.
                    wanted.cache_salt = Some(format!("{worker} {count}"));
                    let begun = Instant::now();
                    let stream = client.generate(wanted).await;
                    let answer = Answer::gather(stream.unwrap().into_inner()).await.unwrap();
                    let _ = say.send((number, begun, answer));
                }
            });
        }
        Self { cluster, expected, served, stop, workers }
    }

    /// The next request that was served; `None` when the workers have stopped.
    async fn next(&mut self) -> Option<Served> {
        let next = tokio::time::timeout(PATIENCE, self.served.recv()).await;
        let (number, begun, answer) = next.expect("requests are served")?;
        assert_eq!(answer.tokens, self.expected[number], "prompt {number}");
        Some(Served { begun, placement: answer.finished.unwrap().placement.unwrap() })
    }

    /// Checks where requests go that are sent from now on.
    async fn all_from_now(&mut self, right: impl Fn(&Placement) -> bool) {
        let (now, mut checked) = (Instant::now(), 0);
        while checked < 3 * WORKERS {
            let served = self.next().await.expect("workers work");
            if served.begun > now {
                assert!(right(&served.placement), "{:?}", served.placement);
                checked += 1;
            }
        }
    }

    /// Runs `baton` against the second coordinator.
    fn operate(&self, arguments: &[&str]) -> Result<String, String> {
        let coordinator = self.cluster.cluster.coordinators()[1].grpc.to_string();
        let mut command = Command::new(daemons().join("baton"));
        let output =
            command.args(arguments).args(["--coordinator", &coordinator]).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    async fn role_of(&self, name: &str) -> String {
        let nodes = self.cluster.nodes().await;
        nodes.into_iter().find(|node| node.id == name).unwrap().role
    }
}

async fn start() -> Load {
    let reference = TestCluster::start(options(0, 1)).await;
    let mut expected = Vec::new();
    for number in 0..PROMPTS {
        let answer = reference.complete(request(prompt(number), TOKENS)).await.unwrap();
        expected.push(answer.tokens);
    }
    reference.cluster.stop().await;
    let mut wanted = options(2, 2);
    (wanted.coordinators, wanted.local_prefill) = (2, Some("never".into()));
    Load::start(TestCluster::start(wanted).await, expected)
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_drains_change_under_load_without_a_failed_request() {
    let mut load = start().await;
    load.next().await.expect("workers work");

    // All decoding moves to what was a prefill node.
    let said = load.operate(&["role", "prefill-1", "decode"]).unwrap();
    assert!(said.starts_with("prefill-1 is a decode node"), "{said}");
    assert_eq!(load.role_of("prefill-1").await, "decode");
    for node in ["decode-0", "decode-1"] {
        load.operate(&["drain", node, "--wait"]).unwrap();
    }
    load.all_from_now(|placed| placed.decode_node == "prefill-1").await;
    let last = load.operate(&["drain", "prefill-1"]).unwrap_err();
    assert!(last.contains("prefill-1 is the last decode node of"), "{last}");
    let unknown = load.operate(&["drain", "decode1"]).unwrap_err();
    assert_eq!(unknown, "baton: no node decode1 has joined; did you mean decode-1?");

    // And back: now it does all prefill.
    assert_eq!(load.operate(&["drain", "decode-0", "--undo"]).unwrap(), "decode-0 takes work");
    load.operate(&["drain", "decode-1", "--undo"]).unwrap();
    load.operate(&["role", "prefill-1", "prefill"]).unwrap();
    load.operate(&["drain", "prefill-0", "--wait"]).unwrap();
    load.all_from_now(|placed| placed.prefill_node == "prefill-1").await;
    load.operate(&["drain", "prefill-0", "--undo"]).unwrap();

    load.stop.send_replace(true);
    while load.next().await.is_some() {}
    while let Some(ended) = load.workers.join_next().await {
        ended.expect("no request fails");
    }
    let status = load.cluster.operator().get_status(GetStatusRequest {}).await;
    assert_eq!(status.unwrap().into_inner().requests_failed, 0);
    assert_eq!(load.cluster.idle().await.len(), 4);
}

#[tokio::test]
async fn a_tenants_cache_is_seen_by_its_name() {
    let cluster = TestCluster::start(options(0, 1)).await;
    let prefix = "The quick brown fox jumps over the lazy dog, and then it does so again. ";
    let mut wanted = request(Vec::new(), 4);
    wanted.input = Some(Input::Prompt(prefix.to_owned()));
    wanted.tenant = "acme".to_owned();
    cluster.complete(wanted).await.unwrap();
    cluster.idle().await;
    let matched = async |tenant: Option<&str>, cache_salt: Option<&str>| {
        let query = GetCacheRequest {
            prefix: Some(prefix.to_owned()),
            tenant: tenant.map(str::to_owned),
            cache_salt: cache_salt.map(str::to_owned),
            ..Default::default()
        };
        let cache = cluster.operator().get_cache(query).await.unwrap().into_inner();
        cache.nodes[0].matched_tokens
    };
    // What is cached is told a little later than the request ends.
    let seen = async {
        while matched(Some("acme"), None).await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, seen).await.expect("the tenant's cache is seen");
    assert_eq!(matched(None, None).await, 0);
    assert_eq!(matched(Some("other"), None).await, 0);
    assert_eq!(matched(Some("acme"), Some("salt")).await, 0);
}
