//! Several coordinators of the same nodes: one that dies by SIGKILL costs its own clients a retry
//! and nobody else anything.

use std::io::{BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use baton_proto::wire::v1::GenerateRequest;
use baton_tests::{Answer, Chance, TestCluster, daemons, options, request};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;

const STREAMS: u64 = 16;
const TOKENS: u32 = 200;

/// Streams below [`STREAMS`] go through the first coordinator, the others through the second.
fn prompt(stream: u64) -> Vec<u32> {
    Chance(stream).tokens(60 + 5 * stream as usize)
}

/// Runs one stream; tells `progress` of every message.
async fn follow(
    cluster: &TestCluster,
    coordinator: usize,
    request: GenerateRequest,
    progress: &mpsc::UnboundedSender<usize>,
) -> Result<Answer, Status> {
    let mut messages = cluster.inference_at(coordinator).generate(request).await?.into_inner();
    let mut answer = Answer::default();
    while let Some(message) = messages.message().await? {
        answer.add(message);
        // Nobody listens any more once the coordinator is dead.
        let _ = progress.send(coordinator);
    }
    Ok(answer)
}

fn baton(cluster: &TestCluster, coordinators: &[usize], tokens: &str, output: u32) -> Command {
    let all = cluster.cluster.coordinators();
    let addresses: Vec<String> = coordinators.iter().map(|&at| all[at].grpc.to_string()).collect();
    let mut command = Command::new(daemons().join("baton"));
    command.args(["generate", "--coordinator", &addresses.join(","), "--token-ids", tokens]);
    command.args(["--temperature", "0", "--ignore-eos", "--max-tokens", &output.to_string()]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A `baton generate` that has printed something and has much to print still.
fn begun(cluster: &TestCluster) -> Child {
    let mut child = baton(cluster, &[1, 0], "5,6,7", 3000).spawn().unwrap();
    let mut first = [0];
    BufReader::with_capacity(1, child.stdout.as_mut().unwrap()).read_exact(&mut first).unwrap();
    child
}

fn tokens_of(output: &Output) -> Vec<u32> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let ids = answer["token_ids"].as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_coordinator_costs_its_clients_a_retry_and_others_nothing() {
    let reference = TestCluster::start(options(0, 1)).await;
    let mut expected = Vec::new();
    for stream in 0..2 * STREAMS {
        let answer = reference.complete(request(prompt(stream), TOKENS)).await.unwrap();
        expected.push(answer.tokens);
    }
    reference.cluster.stop().await;

    let mut wanted = options(2, 2);
    (wanted.coordinators, wanted.local_prefill) = (2, Some("never".into()));
    let cluster = Arc::new(TestCluster::start(wanted).await);
    let (progress, mut messages) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    for stream in 0..2 * STREAMS {
        let (cluster, progress) = (Arc::clone(&cluster), progress.clone());
        tasks.spawn(async move {
            let coordinator = (stream / STREAMS) as usize;
            let wanted = request(prompt(stream), TOKENS);
            let first = follow(&cluster, coordinator, wanted.clone(), &progress).await;
            let lost = first.is_err();
            let answer = match first {
                Err(_) if coordinator == 1 => follow(&cluster, 0, wanted, &progress).await,
                other => other,
            };
            (stream, lost, answer.unwrap())
        });
    }
    drop(progress);
    let shown = begun(&cluster);
    let mut heard = [0; 2];
    while heard[0] < 200 || heard[1] < 200 {
        heard[messages.recv().await.expect("streams are still running")] += 1;
    }
    assert!(cluster.cluster.kill("coordinator-1"));
    drop(messages);

    let mut lost_streams = 0;
    for (stream, lost, answer) in tasks.join_all().await {
        assert_eq!(answer.tokens, expected[stream as usize], "stream {stream}");
        let attempts = answer.finished.unwrap().placement.unwrap().attempts;
        assert_eq!(attempts, 1, "stream {stream} was disturbed");
        lost_streams += u32::from(lost);
    }
    assert!(lost_streams > 0, "the death of a coordinator touched no stream");
    assert_eq!(cluster.idle().await.len(), 4, "all nodes stay");

    let shown = shown.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&shown.stderr).into_owned();
    assert_eq!(shown.status.code(), Some(1), "{error}");
    assert!(error.starts_with("baton: the stream broke after "), "{error}");
    let mut wanted = baton(&cluster, &[1, 0], &join(&prompt(0)), TOKENS);
    assert_eq!(tokens_of(&wanted.arg("--json").output().unwrap()), expected[0]);
}

fn join(tokens: &[u32]) -> String {
    tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
