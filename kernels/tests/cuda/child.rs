//! Tests that need a process of their own: because they break the device, or another one.

use std::process::{Command, Output};

/// Names the part of a test that a child process runs.
pub(crate) const PART: &str = "BATON_TEST_PART";

/// The part of the test that is to run here, if this process is a child.
pub(crate) fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// Runs a part of a test in a process with these variables.
pub(crate) fn run(test: &str, part: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(PART, part);
    command.envs(variables.iter().copied()).output().unwrap()
}

/// Runs a part of a test in another process, which must succeed.
#[track_caller]
pub(crate) fn expect(test: &str, part: &str, variables: &[(&str, &str)]) {
    let output = run(test, part, variables);
    let texts = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    let ran = texts[0].contains("1 passed");
    assert!(output.status.success() && ran, "{test} {part}:\n{}{}", texts[0], texts[1]);
}
