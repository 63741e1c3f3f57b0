//! `baton up` as a process, with shell scripts in the place of the daemons.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for something that must happen; a test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `baton up` with a coordinator that leaves its process id behind and then hangs.
fn up(folder: &Path) -> Child {
    std::fs::write(folder.join("config.json"), "{}").expect("writable");
    let daemon = folder.join("baton-coordinator");
    let script = format!("#!/bin/sh\necho $$ >{}/pid\nexec sleep 1000\n", folder.display());
    std::fs::write(&daemon, script).expect("writable");
    std::fs::set_permissions(&daemon, std::fs::Permissions::from_mode(0o755))
        .expect("its owner may");
    Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(["up", "--quiet", "--model"])
        .arg(folder)
        .arg("--daemons")
        .arg(folder)
        .arg("--state")
        .arg(folder.join("state"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("it was built with this test")
}

fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(begun.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn daemon_pid(folder: &Path) -> u32 {
    let read = || std::fs::read_to_string(folder.join("pid")).ok()?.trim().parse().ok();
    eventually("the daemon runs", read)
}

/// Gone, or dead and not yet waited for by whoever inherited it.
fn has_ended(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.map_or(true, |status| status.contains("State:\tZ"))
}

fn send(signal: &str, pid: u32) {
    let status = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).status();
    assert!(status.expect("there is a shell").success());
}

#[test]
fn no_daemon_outlives_a_killed_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = up(folder.path());
    let daemon = daemon_pid(folder.path());
    assert!(!has_ended(daemon));
    up.kill().unwrap();
    up.wait().unwrap();
    eventually("the daemon ends", || has_ended(daemon).then_some(()));
}

#[test]
fn an_interrupted_start_stops_everything_and_says_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let up = up(folder.path());
    let daemon = daemon_pid(folder.path());
    send("TERM", up.id());
    let output = up.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    assert!(output.stdout.is_empty());
    assert!(has_ended(daemon));
}
