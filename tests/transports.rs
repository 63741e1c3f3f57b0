//! The way that KV takes from node to node, as `baton nodes` shows it: the best one that both ends have.

use std::process::Command;
use std::time::Duration;

use baton_cli::launcher::ClusterOptions;
use baton_kernels::cuda::testing::{Emulator, build_emulator};
use baton_tests::{Chance, PATIENCE, TestCluster, daemons, options, request};
use serde_json::Value;
use tokio::time::{sleep, timeout};

/// `baton nodes` for the prefill node.
fn prefill_node(cluster: &TestCluster) -> Value {
    let mut baton = Command::new(daemons().join("baton"));
    let coordinator = cluster.cluster.grpc().to_string();
    let output = baton.args(["nodes", "--json", "--coordinator", &coordinator]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let nodes: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    nodes.into_iter().find(|node| node["id"] == "prefill-0").expect("it has joined")
}

/// Hands KV over, and gives the way that it took.
async fn way(wanted: ClusterOptions) -> String {
    let never = ClusterOptions { local_prefill: Some("never".into()), ..wanted };
    let cluster = TestCluster::start(never).await;
    assert_eq!(prefill_node(&cluster)["kv_transport"], "", "nothing was sent");
    cluster.complete(request(Chance(7).tokens(40), 2)).await.unwrap();
    let shown = async {
        // With the node's next report.
        loop {
            match prefill_node(&cluster)["kv_transport"].as_str().unwrap() {
                "" => sleep(Duration::from_millis(20)).await,
                way => return way.to_owned(),
            }
        }
    };
    let way = timeout(PATIENCE, shown).await.expect("it is reported");
    cluster.cluster.stop().await;
    way
}

#[tokio::test(flavor = "multi_thread")]
async fn cpus_send_bytes() {
    assert_eq!(way(options(1, 1)).await, "quic");
}

/// Emulated ones where there is none.
#[tokio::test(flavor = "multi_thread")]
async fn gpus_of_one_machine_share_memory_unless_told_otherwise() {
    // Two nodes on one device cannot each take most of its memory.
    let (device, kv_memory) = (Some("cuda".into()), Some("64MiB".into()));
    let mut wanted = ClusterOptions { device, kv_memory, ..options(1, 1) };
    if std::env::var("BATON_TEST_DEVICE").as_deref() != Ok("real") {
        match build_emulator(&Emulator::default()) {
            Ok(folder) => wanted.cuda_libraries = Some(folder),
            Err(reason) => {
                eprintln!("skipped: no emulator: {reason}");
                return;
            }
        }
    }
    assert_eq!(way(wanted.clone()).await, "ipc");
    wanted.kv_transports = Some("quic".to_owned());
    assert_eq!(way(wanted).await, "quic");
}
