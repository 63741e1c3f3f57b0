//! The dependency rules of ARCHITECTURE.md, checked against what cargo sees.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which crates of the workspace each crate may name in its `[dependencies]`.
const ALLOWED: &[(&str, &[&str])] = &[
    ("baton-proto", &[]),
    ("baton-kernels", &[]),
    ("baton-grammar", &["baton-proto"]),
    ("baton-identity", &["baton-proto"]),
    ("baton-telemetry", &["baton-proto"]),
    ("baton-engine", &["baton-grammar", "baton-kernels", "baton-proto"]),
    ("baton-kvtransfer", &["baton-identity", "baton-proto"]),
    ("baton-coordinator", &["baton-grammar", "baton-identity", "baton-proto", "baton-telemetry"]),
    (
        "baton-node",
        &[
            "baton-engine",
            "baton-grammar",
            "baton-identity",
            "baton-kvtransfer",
            "baton-proto",
            "baton-telemetry",
        ],
    ),
    ("baton-prefill-node", &["baton-node", "baton-proto"]),
    ("baton-decode-node", &["baton-node", "baton-proto"]),
    (
        "baton-sim",
        &["baton-coordinator", "baton-engine", "baton-kvtransfer", "baton-node", "baton-proto"],
    ),
];

/// Crates from elsewhere that only some crates may use, because of what they stand for.
const CONFINED: &[(&str, &[&str])] = &[
    ("quinn", &["baton-kvtransfer"]),
    ("cudarc", &["baton-kernels"]),
    ("tokenizers", &["baton-coordinator"]),
    ("minijinja", &["baton-coordinator"]),
    ("axum", &["baton-coordinator", "baton-node"]),
    ("opentelemetry", &["baton-telemetry"]),
    ("llguidance", &["baton-grammar"]),
    ("safetensors", &["baton-engine"]),
    ("memmap2", &["baton-engine"]),
    ("rcgen", &["baton-identity"]),
];

/// Files with a decision in them, which take time and randomness as arguments.
const STATE_MACHINES: &[&str] = &[
    "coordinator/src/alerts.rs",
    "coordinator/src/aliases.rs",
    "coordinator/src/control.rs",
    "coordinator/src/front/door/quota.rs",
    "coordinator/src/control",
    "coordinator/src/decision.rs",
    "coordinator/src/events.rs",
    "coordinator/src/history.rs",
    "coordinator/src/requests.rs",
    "coordinator/src/requests",
    "coordinator/src/request.rs",
    "coordinator/src/request",
    "coordinator/src/life.rs",
    "coordinator/src/life",
    "coordinator/src/placement",
    "coordinator/src/index.rs",
    "coordinator/src/index",
    "coordinator/src/cluster.rs",
    "coordinator/src/orders.rs",
    "coordinator/src/peers.rs",
    "coordinator/src/roles.rs",
    "engine/src/blocks.rs",
    "engine/src/prefix.rs",
    "engine/src/scheduler.rs",
    "engine/src/scheduler",
    "engine/src/sampler.rs",
    "engine/src/sequence.rs",
    "engine/src/pace.rs",
    "kvtransfer/src/frame.rs",
    "kvtransfer/src/grid.rs",
    "kvtransfer/src/inbox.rs",
    "kvtransfer/src/sender.rs",
    "kvtransfer/src/receiver.rs",
    "node/src/worker.rs",
    "node/src/worker",
    "sim/src",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Crate name to the names in its `[dependencies]`.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let normal = all.filter(|d| d["kind"].is_null()).map(|d| text(&d["name"]));
            (text(&package["name"]), normal.collect())
        })
        .collect()
}

#[test]
fn crates_name_only_whom_they_may() {
    let found = dependencies();
    for (name, allowed) in ALLOWED {
        let own = found[*name].iter().filter(|d| d.starts_with("baton-"));
        let forbidden: Vec<_> = own.filter(|d| !allowed.contains(&d.as_str())).collect();
        assert!(forbidden.is_empty(), "{name} depends on {forbidden:?}");
    }
}

#[test]
fn some_dependencies_are_confined() {
    for (name, dependencies) in dependencies() {
        for (dependency, users) in CONFINED {
            let uses = dependencies.contains(*dependency);
            assert!(!uses || users.contains(&name.as_str()), "{name} depends on {dependency}");
        }
    }
}

/// Tests are in files of their own where they are long.
fn is_test(path: &Path) -> bool {
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    let inside = path.strip_prefix(root()).expect("sources are in the workspace");
    name.ends_with("tests") || inside.iter().any(|part| part == "tests")
}

fn sources(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") && !is_test(path) {
        found.push(path.to_owned());
    }
}

#[test]
fn decisions_take_time_and_chance_as_arguments() {
    let banned = [
        "Instant::now",
        "SystemTime",
        "tokio::",
        "std::thread",
        "std::net",
        "async fn",
        "getrandom",
    ];
    let mut files = Vec::new();
    STATE_MACHINES.iter().for_each(|machine| sources(&root().join(machine), &mut files));
    assert!(
        files.len() >= STATE_MACHINES.len(),
        "the list of state machines is out of date: {files:?}"
    );
    // Where virtual time begins.
    files.retain(|file| !file.ends_with("sim/src/origin.rs"));
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for word in banned {
            assert!(!code.contains(word), "{} mentions {word}", file.display());
        }
    }
}

#[test]
fn unsafe_code_is_where_it_must_be() {
    let allowed = ["kernels/", "engine/", "cli/src/signals.rs"];
    let mut files = Vec::new();
    let members = ALLOWED.iter().map(|(name, _)| name.trim_start_matches("baton-"));
    for member in members.chain(["cli"]) {
        sources(&root().join(member).join("src"), &mut files);
    }
    for file in files {
        let name = file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let opts_out = text.contains("(unsafe_code");
        let fine = allowed.iter().any(|place| name.starts_with(place));
        assert!(!opts_out || fine, "{name} allows unsafe code");
    }
}
