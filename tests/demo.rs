//! The README's first command: three right answers, and KV that was really handed over.

use std::process::Command;

use baton_kernels::cuda::testing::{Emulator, build_emulator};

#[test]
fn the_demo_ends_with_right_answers() {
    expect_right_answers(&mut demo());
}

/// The whole way on GPUs: on emulated ones where there is none.
#[test]
fn the_demo_ends_with_right_answers_on_gpus() {
    let mut demo = demo();
    demo.args(["--device", "cuda"]);
    if std::env::var("BATON_TEST_DEVICE").as_deref() != Ok("real") {
        match build_emulator(&Emulator::default()) {
            Ok(folder) => demo.arg("--cuda-libraries").arg(folder),
            Err(reason) => {
                eprintln!("skipped: no emulator: {reason}");
                return;
            }
        };
    }
    expect_right_answers(&mut demo);
}

fn demo() -> Command {
    let test = std::env::current_exe().unwrap();
    let mut command = Command::new(test.ancestors().nth(2).unwrap().join("baton"));
    command.arg("demo");
    command
}

fn expect_right_answers(demo: &mut Command) {
    let output = demo.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("All answers are right."), "{text}");
    assert!(text.contains("prefill-0 -> decode-0"), "no KV was handed over:\n{text}");
}
