//! Faults that are planted in kernels are found by the tests: what the emulator models is checked
//! by what it catches.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use baton_kernels::cuda::testing::{self, EMULATOR_FOLDER, Emulator, build_emulator};

/// After which a kernel that never ends counts as found.
const PATIENCE: Duration = Duration::from_secs(120);

/// A change of a kernel, and the tests that must fail by it.
struct Fault {
    /// The kernel's file.
    source: &'static str,
    /// The file that is changed: the same, or a header that it includes.
    file: &'static str,
    from: &'static str,
    to: &'static str,
    tests: &'static str,
}

const FAULTS: &[Fault] = &[
    Fault {
        source: "norm.cu",
        file: "reduce.cuh",
        from: "partial[warp] = value;\n  __syncthreads();",
        to: "partial[warp] = value;",
        tests: "norm::",
    },
    Fault {
        source: "norm.cu",
        file: "norm.cu",
        from: "place(i) < width ? load_vector",
        to: "place(i) < width + 4096 ? load_vector",
        tests: "norm::",
    },
    Fault {
        source: "tile.cu",
        file: "tile.cu",
        from: "cp_async_wait<0>();",
        to: "cp_async_wait<1>();",
        tests: "tile::",
    },
    Fault {
        source: "tile.cu",
        file: "tile.cu",
        from: "mbarrier_wait(full + s * 8, i / STAGES % 2);",
        to: "",
        tests: "tile::",
    },
    Fault {
        source: "tile.cu",
        file: "tile.cu",
        from: "mbarrier_wait(empty + s * 8, (i / STAGES + 1) % 2);",
        to: "",
        tests: "tile::",
    },
    Fault {
        source: "tile.cu",
        file: "tile.cu",
        from: "wgmma_wait<0>();\n      keep_registers(d);",
        to: "wgmma_wait<1>();",
        tests: "tile::",
    },
];

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// Runs tests of this binary on an emulator with a changed kernel.
fn start(source: &str, text: String, tests: &str) -> Child {
    let emulator = Emulator { changed: vec![(source.to_owned(), text)] };
    let folder = build_emulator(&emulator).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    // Not these, which would start themselves.
    command.args([tests, "--skip", "faults::", "--test-threads", "1"]);
    command.env(EMULATOR_FOLDER, folder);
    command.env("BATON_TEST_DEVICE", "emulator");
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Whether tests fail. Ones that do not end are stopped.
fn fail(mut tests: Child) -> bool {
    let start = Instant::now();
    loop {
        if let Some(status) = tests.try_wait().unwrap() {
            return !status.success();
        }
        if start.elapsed() > PATIENCE {
            tests.kill().unwrap();
            tests.wait().unwrap();
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether this process can test changed kernels.
fn possible() -> bool {
    let emulated = testing::test_device().is_some_and(|device| device.emulator.is_some());
    if !emulated {
        eprintln!("skipped: needs the emulator");
    }
    emulated
}

#[test]
fn planted_faults_are_found() {
    if !possible() {
        return;
    }
    for Fault { source, file, from, to, tests } in FAULTS {
        let read = |name: &str| fs::read_to_string(kernels().join(name)).unwrap();
        let changed = read(file).replacen(from, to, 1);
        assert_ne!(changed, read(file), "{file} has no {from:?} any more");
        let text = match source == file {
            true => changed,
            false => read(source).replace(&format!("#include \"{file}\""), &changed),
        };
        assert!(fail(start(source, text, tests)), "{tests} passes without {from:?} in {file}");
    }
}

/// Everything that makes threads wait for each other or for copies.
const ORDER: &[&str] = &[
    "__syncthreads();",
    "__syncwarp();",
    "cp_async_wait<",
    "mbarrier_wait(",
    "mbarrier_arrive(",
    "wgmma_wait<",
    "barrier_sync(",
    "barrier_arrive(",
    "tma_store_wait_read<",
];
/// Behind a line without which kernels work in the emulator too, for a reason that the comment says.
const EXCUSE: &str = "// not seen by the emulator";

/// The text without statement number `index` that begins with one of [`ORDER`], and its line.
fn without(text: &str, index: usize) -> Option<(String, usize)> {
    let mut places: Vec<_> = ORDER.iter().flat_map(|word| text.match_indices(word)).collect();
    places.sort_unstable();
    // `barrier_sync(` is also the end of other names.
    places.retain(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
    let (start, _) = *places.get(index)?;
    let end = start + text[start..].find(';')?;
    let line = text[..start].matches('\n').count();
    Some((format!("{}{}", &text[..start], &text[end..]), line))
}

/// The module of tests for a kernel's file, or all of them.
fn tests_of(source: &str) -> &'static str {
    let modules =
        ["attention::", "blocks::", "norm::", "quantize::", "rope::", "sampling::", "tile::"];
    let module = modules.iter().find(|module| source.contains(module.trim_end_matches("::")));
    module.copied().unwrap_or_default()
}

/// Removes each of them from each kernel, in turn. Takes minutes:
/// `cargo test -p baton-kernels --test cuda -- --ignored --nocapture every_wait_matters`
#[test]
#[ignore = "takes minutes"]
fn every_wait_matters() {
    if !possible() {
        return;
    }
    let only = std::env::var("BATON_FAULTS_IN").unwrap_or_default();
    let mut missed = Vec::new();
    let files = fs::read_dir(kernels()).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|f| f.extension().is_some_and(|e| e == "cu")).collect();
    files.sort();
    for file in files.iter().filter(|file| file.to_string_lossy().contains(&only)) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let text = fs::read_to_string(file).unwrap();
        let lines: Vec<_> = text.lines().collect();
        for (changed, line) in (0..).map_while(|index| without(&text, index)) {
            if lines[line].contains(EXCUSE) {
                continue;
            }
            let found = fail(start(name, changed, tests_of(name)));
            let place = format!("{name}:{}: {}", line + 1, lines[line].trim());
            println!("{} {place}", if found { "found " } else { "missed" });
            if !found {
                missed.push(place);
            }
        }
    }
    assert!(missed.is_empty(), "missed:\n{}", missed.join("\n"));
}
