//! What is missing or broken is an error of one line, and no panic.

use std::path::{Path, PathBuf};
use std::process::Command;

use baton_kernels::cuda::testing::{self, Emulator, build_emulator};
use baton_kernels::cuda::{
    Buffer, Device, DeviceError, Libraries, LibraryPaths, Missing, Stream, probe, rms_norm,
};
use half::bf16;

use crate::child;

fn emulator() -> Option<LibraryPaths> {
    let folder = build_emulator(&Emulator::default()).ok()?;
    Some(LibraryPaths { folders: vec![folder], environments: Vec::new() })
}

/// Tries to use a device as the emulator of this process is set up, and gives the error.
fn error() -> String {
    let paths = emulator().expect("the parent built it");
    let report = probe(&paths).to_string();
    let error = match Libraries::find(&paths) {
        Err(missing) => missing.to_string(),
        Ok(libraries) => Device::open(&libraries, 0).expect_err("it is broken").to_string(),
    };
    assert!(report.contains(&error), "{report:?} does not say {error:?}");
    error
}

fn expect(name: &str, variables: &[(&str, &str)]) {
    // Real libraries cannot be set up like this.
    if testing::test_device().is_some_and(|device| device.emulator.is_some()) {
        child::expect(&format!("failures::{name}"), "child", variables);
    }
}

#[test]
fn no_device() {
    if child::part().is_none() {
        return expect("no_device", &[("BATON_EMULATOR_DEVICES", "0")]);
    }
    assert!(error().starts_with("cuInit: CUDA_ERROR_NO_DEVICE"), "{}", error());
}

#[test]
fn an_old_driver() {
    if child::part().is_none() {
        return expect("an_old_driver", &[("BATON_EMULATOR_VERSION", "12040")]);
    }
    assert_eq!(error(), "the driver supports CUDA 12.4, and 13.0 is needed");
}

#[test]
fn an_old_device() {
    if child::part().is_none() {
        return expect("an_old_device", &[("BATON_EMULATOR_CAPABILITY", "75")]);
    }
    assert_eq!(error(), "compute capability 7.5 is too old: 8.0 is needed");
}

#[test]
fn a_small_device() {
    if child::part().is_none() {
        return expect("a_small_device", &[("BATON_EMULATOR_CAPABILITY", "89")]);
    }
    assert_eq!(error(), "emulator: 99 KiB of shared memory, 105 needed");
}

#[test]
fn a_device_that_is_not_there() {
    let Some(stream) = testing::test_stream() else { return };
    let paths = emulator().unwrap_or_else(LibraryPaths::from_environment);
    let Ok(libraries) = Libraries::find(&paths) else { return };
    let error = Device::open(&libraries, 99).expect_err("nobody has a hundred");
    assert!(error.to_string().starts_with("there is no device 99: the driver sees"), "{error}");
    stream.synchronize().unwrap();
}

/// Where there is no driver: in a process that has not loaded the emulator.
#[test]
fn no_library() {
    if child::part().is_none() {
        return child::expect("failures::no_library", "child", &[]);
    }
    let paths = LibraryPaths { folders: vec!["/nowhere".into()], environments: Vec::new() };
    match Libraries::find(&paths) {
        Ok(_) => eprintln!("skipped: there is a driver"),
        Err(missing) => {
            let text = missing.to_string();
            assert!(text.starts_with("libcuda.so.1 not found (") && !text.contains('\n'), "{text}");
        }
    }
}

/// A library with this name and one function.
fn library_without_functions(folder: &Path) -> bool {
    let source = folder.join("driver.c");
    std::fs::write(&source, "int cuCtxSetCurrent(void *context) { return 0; }").unwrap();
    let mut command = Command::new("g++");
    command.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-o"]);
    command.arg(folder.join("libcuda.so.1")).arg(source);
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn a_library_that_lacks_a_function() {
    if child::part().is_none() {
        return child::expect("failures::a_library_that_lacks_a_function", "child", &[]);
    }
    let folder = tempfile::tempdir().unwrap();
    if !library_without_functions(folder.path()) {
        return eprintln!("skipped: there is no g++");
    }
    let paths = LibraryPaths { folders: vec![folder.path().into()], environments: Vec::new() };
    let path = folder.path().join("libcuda.so.1");
    let library = "libcuda.so.1";
    let expected = Missing::Symbol { library, path, symbol: "cuDeviceGet" };
    assert_eq!(Libraries::find(&paths), Err(expected));
}

/// Packages of a Python environment are found in it.
#[test]
fn libraries_are_found_in_python_environments() {
    if child::part().is_none() {
        return expect("libraries_are_found_in_python_environments", &[]);
    }
    let folder = emulator().unwrap().folders.remove(0);
    let environment = tempfile::tempdir().unwrap();
    for (package, library) in [("cuda", "libcuda.so.1"), ("cu13", "libcublasLt.so.13")] {
        let package = environment.path().join("lib/python3.12/site-packages/nvidia").join(package);
        std::fs::create_dir_all(package.join("lib")).unwrap();
        std::fs::copy(folder.join(library), package.join("lib").join(library)).unwrap();
    }
    if Libraries::find(&LibraryPaths::default()).is_ok() {
        return eprintln!("skipped: the system has its own, which goes first");
    }
    let paths = LibraryPaths { folders: Vec::new(), environments: vec![environment.path().into()] };
    let libraries = Libraries::find(&paths).unwrap();
    assert!(libraries.blas.starts_with(environment.path()), "{libraries:?}");
}

/// A library with the functions of cuBLASLt, which do nothing.
fn blas_without_contents(file: &Path) -> bool {
    let symbols = include_str!("../../src/cuda/symbols.rs");
    let names = symbols.split("c\"cublasLt").skip(1).map(|rest| rest.split('"').next().unwrap());
    let text: String =
        names.map(|name| format!("int cublasLt{name}(void) {{ return 0; }}\n")).collect();
    let source = file.with_extension("c");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&source, text).unwrap();
    let mut command = Command::new("g++");
    command.args(["-shared", "-fPIC", "-Wl,-soname,libcublasLt.so.13", "-x", "c", "-o"]);
    command.arg(file).arg(source).status().is_ok_and(|status| status.success())
}

/// Names the folder of the test below to its child.
const ROOT: &str = "BATON_TEST_ROOT";

/// cudarc finds a toolkit's by the name without a version, where the packages of an active
/// environment have another.
#[test]
fn a_toolkit_and_an_environment_may_both_be_there() {
    let made = tempfile::tempdir().unwrap();
    // Of the child it is its parent's.
    let root = std::env::var_os(ROOT).map_or_else(|| made.path().into(), PathBuf::from);
    let (toolkit, environment) = (root.join("toolkit"), root.join("environment"));
    let installed = root.join("installed/libcublasLt.so.13.0.2");
    let package = environment.join("lib/python3.12/site-packages/nvidia/cu13/lib");
    let library = package.join("libcublasLt.so.13");
    let Some(part) = child::part() else {
        let emulated = testing::test_device().is_some_and(|device| device.emulator.is_some());
        let folder = emulator().filter(|_| emulated).map(|mut paths| paths.folders.remove(0));
        let Some(folder) = folder else { return };
        assert!(blas_without_contents(&library) && blas_without_contents(&installed));
        // Before the child starts: the loader looks once which folders there are.
        std::fs::create_dir_all(&toolkit).unwrap();
        std::os::unix::fs::symlink(&installed, toolkit.join("libcublasLt.so")).unwrap();
        std::fs::copy(folder.join("libcuda.so.1"), root.join("libcuda.so.1")).unwrap();
        let [path, root] = [&toolkit, &root].map(|folder| folder.to_str().unwrap());
        for part in ["environment", "chosen"] {
            let test = "failures::a_toolkit_and_an_environment_may_both_be_there";
            child::expect(test, part, &[("LD_LIBRARY_PATH", path), (ROOT, root)]);
        }
        return;
    };
    let mut paths = LibraryPaths { folders: vec![root], environments: vec![environment] };
    if part == "environment" {
        assert_eq!(Libraries::find(&paths).unwrap().blas, installed.canonicalize().unwrap());
    } else {
        // What somebody chose is not to be replaced without a word.
        paths.folders.push(package);
        let ambiguous = Missing::Ambiguous { library: "libcublasLt.so.13", path: library };
        assert_eq!(Libraries::find(&paths), Err(ambiguous));
    }
}

/// After a device is lost, everything says so, and memory and streams can still be dropped.
#[test]
fn a_lost_device() {
    if child::part().is_none() {
        return expect("a_lost_device", &[("BATON_TEST_DEVICE", "emulator")]);
    }
    let device = testing::test_device().unwrap();
    let stream = Stream::new(&device.device).unwrap();
    let buffer = stream.buffer(&[bf16::ONE; 8]).unwrap();
    testing::lose_device();
    let lost = |result: Result<(), DeviceError>| result.expect_err("it is lost").is_lost();
    assert!(lost(rms_norm(&stream, buffer.all(), buffer.all(), buffer.all(), 0.0)));
    assert!(lost(stream.synchronize()));
    assert!(lost(Buffer::<u8>::new(&device.device, 1).map(|_| ())));
    let error = stream.synchronize().unwrap_err().to_string();
    assert!(error.starts_with("the device is lost: cuStreamSynchronize: CUDA_ERROR"), "{error}");
}

#[test]
fn probing_lists_devices() {
    let Some(_) = testing::test_stream() else { return };
    if let Some(paths) = emulator().filter(|_| testing::test_device().unwrap().emulator.is_some()) {
        let report = probe(&paths).to_string();
        let expected = "\ndevice 0: emulator, compute capability 9.0, 4.0 GiB, 3 multiprocessors";
        assert!(report.contains(expected), "{report}");
    }
}
