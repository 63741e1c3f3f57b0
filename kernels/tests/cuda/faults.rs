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
        source: "sampling_scan.cu",
        file: "reduce.cuh",
        from: "__syncthreads();\n  if (threadIdx.x % 32 == 0) partial[warp] = value;",
        to: "if (threadIdx.x % 32 == 0) partial[warp] = value;",
        tests: "sampling::",
    },
    Fault {
        source: "prefill_attention.cu",
        file: "prefill_producer.cuh",
        from: "__syncwarp();\n    if (lane >= PAGES * COLUMNS) return;",
        to: "if (lane >= PAGES * COLUMNS) return;",
        tests: "attention::a_warp_that_copies_stays_together",
    },
    Fault {
        source: "decode_attention.cu",
        file: "decode_merge.cuh",
        from: "end, factors);\n      __syncthreads();",
        to: "end, factors);",
        tests: "attention::a_long_sequence",
    },
    Fault {
        source: "decode_attention.cu",
        file: "decode_merge.cuh",
        from: "factors[row] = a.value_scale / weight;\n    __syncthreads();",
        to: "factors[row] = a.value_scale / weight;",
        tests: "attention::a_long_sequence",
    },
    Fault {
        source: "prefill_attention.cu",
        file: "prefill_consumer.cuh",
        from: "column_of(i) > newest",
        to: "column_of(i) > newest + 1",
        tests: "attention::greater_scores",
    },
    Fault {
        source: "decode_attention.cu",
        file: "decode_products.cuh",
        from: "at <= position - window",
        to: "at < position - window",
        tests: "attention::single_rows_see",
    },
    Fault {
        source: "sampling_scan.cu",
        file: "sampling_scan.cu",
        from: ">> token % 32 & 1",
        to: ">> (token ^ 1) % 32 & 1",
        tests: "sampling::",
    },
    Fault {
        source: "norm.cu",
        file: "norm.cu",
        from: "place(i) < width ? load_vector",
        to: "place(i) < width + 4096 ? load_vector",
        tests: "norm::",
    },
    Fault {
        source: "norm.cu",
        file: "norm.cu",
        from: "if (place(i) < width) store_vector",
        to: "if (place(i) <= width) store_vector",
        tests: "norm::",
    },
    Fault {
        source: "widen.cu",
        file: "widen.cu",
        from: "is_v ? v_scale : k_scale",
        to: "k_scale",
        tests: "widen::",
    },
    Fault {
        source: "widen.cu",
        file: "widen.cu",
        from: "if (i + j * step >= units) continue;",
        to: "",
        tests: "widen::",
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

/// The text of a kernel's file with the headers that it includes, one file of them changed, except
/// those that the emulator has its own of.
fn flatten(name: &str, changed: (&str, &str), seen: &mut Vec<String>) -> String {
    let read = || fs::read_to_string(kernels().join(name)).unwrap();
    let text = if changed.0 == name { changed.1.to_owned() } else { read() };
    let mut flat = String::new();
    for line in text.lines() {
        let header = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match header {
            Some(header) if !EMULATED.contains(&header) => {
                if !seen.iter().any(|other| other == header) {
                    seen.push(header.to_owned());
                    flat += &flatten(header, changed, seen);
                }
            }
            _ => flat += line,
        }
        flat += "\n";
    }
    flat
}

/// Headers whose contents are not those of the emulator.
const EMULATED: &[&str] = &["ptx.cuh", "hopper.cuh"];

/// Tests of this binary, or of another one, on an emulator. The compiler's output if it has none.
fn tests(filter: &str, emulator: &Emulator) -> Result<Command, String> {
    let own = || std::env::current_exe().unwrap().into_os_string();
    let mut command = Command::new(std::env::var_os("BATON_FAULTS_TESTS").unwrap_or_else(own));
    // Not these, which would start themselves.
    command.args([filter, "--skip", "faults::", "--test-threads", "1"]);
    command.env(EMULATOR_FOLDER, build_emulator(emulator)?);
    command.env("BATON_TEST_DEVICE", "emulator");
    Ok(command)
}

/// Starts tests with a file changed, of those that a kernel is made of.
fn start(source: &str, changed: (&str, &str), filter: &str) -> Result<Child, String> {
    let text = flatten(source, changed, &mut Vec::new());
    let emulator = Emulator { changed: vec![(source.to_owned(), text)] };
    let mut command = tests(filter, &emulator)?;
    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
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
        let text = fs::read_to_string(kernels().join(file)).unwrap();
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{file} has no {from:?} any more");
        let found = fail(start(source, (file, &changed), tests).unwrap());
        assert!(found, "{tests} passes without {from:?} in {file}");
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

/// Files of kernels with a given extension, by name.
fn names(extension: &str) -> Vec<String> {
    let files = fs::read_dir(kernels()).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|file| file.extension().is_some_and(|found| found == extension));
    let mut names: Vec<_> =
        files.map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Each file with a kernel that it is part of.
fn files() -> Vec<(String, String)> {
    let sources = names("cu");
    let with = |header: &String| {
        let included = |source: &&String| {
            let mut seen = Vec::new();
            flatten(source, ("", ""), &mut seen);
            seen.contains(header)
        };
        // The last one: of the kernels that reduce over a block, sampling does so again and again.
        Some((header.clone(), sources.iter().rfind(included)?.clone()))
    };
    let headers = names("cuh").into_iter().filter_map(|header| with(&header)).collect::<Vec<_>>();
    let own = sources.iter().map(|source| (source.clone(), source.clone()));
    own.chain(headers).collect()
}

/// Removes each of them from each file, in turn. Takes minutes:
/// `cargo test -p baton-kernels --test cuda -- --ignored --nocapture every_wait_matters`
///
/// `BATON_FAULTS_IN=norm` looks at some files only; `BATON_FAULTS_TESTS` is another binary of tests.
#[test]
#[ignore = "takes minutes"]
fn every_wait_matters() {
    if !possible() {
        return;
    }
    let only = std::env::var("BATON_FAULTS_IN").unwrap_or_default();
    let mut missed = Vec::new();
    for (file, source) in files().iter().filter(|(file, _)| file.contains(&only)) {
        let text = fs::read_to_string(kernels().join(file)).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let sound = tests(tests_of(source), &Emulator::default());
        let sound = sound.unwrap().output().unwrap();
        let passed = String::from_utf8_lossy(&sound.stdout).into_owned();
        let some = sound.status.success() && !passed.contains(" 0 passed");
        assert!(some, "tests of {source} pass before anything is changed:\n{passed}");
        for (changed, line) in (0..).map_while(|index| without(&text, index)) {
            if lines[line].contains(EXCUSE) {
                continue;
            }
            let Ok(child) = start(source, (file, &changed), tests_of(source)) else {
                continue; // it does not compile without
            };
            let found = fail(child);
            let place = format!("{file}:{}: {}", line + 1, lines[line].trim());
            println!("{} {place}", if found { "found " } else { "missed" });
            if !found {
                missed.push(place);
            }
        }
    }
    assert!(missed.is_empty(), "missed:\n{}", missed.join("\n"));
}
