//! The README's first command: three right answers, and KV that was really handed over.

use std::process::Command;

#[test]
fn the_demo_ends_with_right_answers() {
    let test = std::env::current_exe().unwrap();
    let baton = test.ancestors().nth(2).unwrap().join("baton");
    let output = Command::new(baton).arg("demo").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("All answers are right."), "{text}");
    assert!(text.contains("prefill-0 -> decode-0"), "no KV was handed over:\n{text}");
}
