//! The binaries that are built in are those of the sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use baton_kernels::cuda::{IMAGES, Target, testing};
use serde_json::Value;

/// The folder of the sources. None where only the test binary is.
fn sources() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    if !folder.is_dir() {
        eprintln!("skipped: no sources here");
    }
    folder.is_dir().then_some(folder)
}

/// The manifests of the binaries, by the names of their sources.
fn manifests(folder: &Path) -> BTreeMap<String, Value> {
    let files = fs::read_dir(folder.join("cubin")).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|file| file.extension().is_some_and(|extension| extension == "json"));
    let read = |file: &PathBuf| serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    files.map(|file| (stem(&file), read(&file))).collect()
}

fn stem(file: &Path) -> String {
    file.file_stem().unwrap().to_string_lossy().into_owned()
}

/// What FNV-1a begins with.
const FNV: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a (Fowler, Noll, Vo), 64 bits.
fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Headers of the folder that a file includes, directly or not.
fn includes(folder: &Path, file: &Path, found: &mut BTreeMap<String, PathBuf>) {
    let text = fs::read_to_string(file).unwrap();
    for name in text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'))
    {
        if name.ends_with(".cuh") && !name.contains('/') {
            found.insert(name.to_owned(), folder.join(name));
            includes(folder, &folder.join(name), found);
        }
    }
}

fn digest(folder: &Path, source: &Path) -> String {
    let mut headers = BTreeMap::new();
    includes(folder, source, &mut headers);
    let files = std::iter::once(source).chain(headers.values().map(PathBuf::as_path));
    let hash = files.fold(FNV, |hash, file| fnv(hash, &fs::read(file).unwrap()));
    format!("{hash:016x}")
}

#[test]
fn images_are_of_these_sources() {
    let Some(folder) = sources() else { return };
    let manifests = manifests(&folder);
    let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    for source in files.filter(|file| file.extension().is_some_and(|e| e == "cu")) {
        let name = stem(&source);
        let manifest = &manifests[&name];
        let same = manifest["digest"] == digest(&folder, &source);
        assert!(same, "{name}.cu is not what its binaries are of: run scripts/build-kernels");
        for (binary, digest) in manifest["binaries"].as_object().unwrap() {
            let built_in = IMAGES.iter().find(|image| image.file == binary);
            let built_in = built_in.map(|image| format!("{:016x}", fnv(FNV, image.bytes)));
            let same = built_in.is_some_and(|built_in| *digest == built_in);
            assert!(same, "{binary} is not what was compiled: run scripts/build-kernels");
        }
    }
}

/// Kernels that a device has are those that the sources have: none lacks its line for the emulator.
#[test]
fn every_kernel_is_found() {
    let (Some(folder), Some(device)) = (sources(), testing::test_device()) else { return };
    for manifest in manifests(&folder).values() {
        let portable = manifest["binaries"].as_object().unwrap().len() > 1;
        if device.device.target() == Target::Portable && !portable {
            continue;
        }
        for name in manifest["kernels"].as_object().unwrap().keys() {
            assert!(testing::has_kernel(&device.device, name), "no REGISTER_KERNEL({name})");
        }
    }
}

#[test]
fn assembly_is_in_two_headers_only() {
    let Some(folder) = sources() else { return };
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() || ["ptx.cuh", "hopper.cuh"].contains(&name.as_str()) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
        let assembly = words.into_iter().any(|word| word == "asm" || word == "__asm__");
        assert!(!assembly, "{name} contains assembly, which the emulator cannot run");
    }
}

#[test]
fn images_are_what_drivers_load() {
    for image in IMAGES {
        match image.target {
            Target::Hopper => assert!(image.bytes.starts_with(b"\x7fELF"), "{}", image.file),
            Target::Portable => {
                let text = std::str::from_utf8(image.bytes).unwrap();
                assert!(text.contains(".target sm_80"), "{}", image.file);
            }
        }
    }
}

/// A spilled accumulator costs more than anything else could gain.
#[test]
fn no_registers_are_spilled() {
    let Some(folder) = sources() else { return };
    for (file, manifest) in manifests(&folder) {
        let kernels = manifest["kernels"].as_object().unwrap();
        assert!(!kernels.is_empty(), "{file} has no kernels");
        for (name, usage) in kernels {
            assert_eq!(usage["spilled_bytes"].as_u64(), Some(0), "{name} of {file}.cu");
        }
    }
}
