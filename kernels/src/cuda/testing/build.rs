//! Builds the emulator with g++: one object for each source, kept as long as nothing that it is
//! made of changes.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const FLAGS: &[&str] =
    &["-std=c++17", "-O2", "-g", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-psabi"];
/// Not of kernels, which nvcc compiles with its own warnings.
const KERNEL_FLAGS: &[&str] = &["-w", "-x", "c++", "-include", "emulator.h"];

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct Emulator {
    /// Kernels to compile from another text, as (file name, text): faults for tests to find.
    pub changed: Vec<(String, String)>,
}

/// A library, the sources of its own, and the library that it needs.
struct Part {
    library: &'static str,
    folder: &'static str,
    needs: &'static [&'static str],
}

/// The library that has the kernels.
const DRIVER: &str = "libcuda.so.1";

/// A library, a source of it, and the flags for that.
type Source<'a> = (&'static str, PathBuf, &'a [&'a str]);
/// Objects and the libraries that they belong to.
type Objects = Vec<(&'static str, PathBuf)>;

const PARTS: &[Part] = &[
    Part { library: DRIVER, folder: "driver", needs: &[] },
    Part { library: "libcublasLt.so.13", folder: "cublaslt", needs: &["-l:libcuda.so.1"] },
    Part { library: "libnccl.so.2", folder: "nccl", needs: &["-l:libcuda.so.1"] },
];

/// Builds the emulator's libraries, if they are not there yet, and gives their folder.
///
/// # Errors
/// If there is no g++, or it does not compile: with its output.
pub fn build_emulator(emulator: &Emulator) -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let cache = target.unwrap_or_else(|| root.join("../target")).join("emulator");
    fs::create_dir_all(&cache).map_err(|error| error.to_string())?;
    // Test binaries run side by side.
    let lock = fs::File::create(cache.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    Build::new(root, cache, emulator)?.run()
}

struct Build<'a> {
    kernels: PathBuf,
    sources: PathBuf,
    cache: PathBuf,
    flags: Vec<&'static str>,
    /// Of everything that any object may include.
    headers: u64,
    emulator: &'a Emulator,
}

impl<'a> Build<'a> {
    fn new(root: &Path, cache: PathBuf, emulator: &'a Emulator) -> Result<Self, String> {
        let (kernels, sources) = (root.join("cuda"), root.join("emulator"));
        let mut flags = FLAGS.to_vec();
        if std::env::var_os("BATON_EMULATOR_SANITIZE").is_some() {
            flags.push("-fsanitize=address");
        }
        let mut hasher = DefaultHasher::new();
        flags.hash(&mut hasher);
        let parts = PARTS.iter().map(|part| sources.join(part.folder));
        for folder in [kernels.clone(), sources.clone()].into_iter().chain(parts) {
            for file in files(&folder, &["h", "cuh", "ld"])? {
                fs::read(file).map_err(|error| error.to_string())?.hash(&mut hasher);
            }
        }
        Ok(Self { kernels, sources, cache, flags, headers: hasher.finish(), emulator })
    }

    fn run(&self) -> Result<PathBuf, String> {
        let mut sources = Vec::new();
        for file in files(&self.kernels, &["cu"])? {
            sources.push((DRIVER, file, KERNEL_FLAGS));
        }
        for file in files(&self.sources, &["cpp"])? {
            sources.push((DRIVER, file, &[]));
        }
        for part in PARTS {
            for file in files(&self.sources.join(part.folder), &["cpp"])? {
                sources.push((part.library, file, &[]));
            }
        }
        self.link(&self.compile_all(&sources)?)
    }

    /// The objects of sources, by the library that they belong to.
    fn compile_all(&self, sources: &[Source<'_>]) -> Result<Objects, String> {
        let next = AtomicUsize::new(0);
        let done = Mutex::new(vec![Ok(PathBuf::new()); sources.len()]);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some((_, file, flags)) = sources.get(i) else { return };
                let object = self.compile(file, flags);
                done.lock().expect("nothing panics with the lock")[i] = object;
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        let done = done.into_inner().expect("nothing panics with the lock");
        let names = sources.iter().map(|(library, ..)| *library);
        names.zip(done).map(|(library, object)| Ok((library, object?))).collect()
    }

    /// The object of a source.
    fn compile(&self, source: &Path, flags: &[&str]) -> Result<PathBuf, String> {
        let name = source.file_name().expect("a file").to_string_lossy();
        let changed = self.emulator.changed.iter().find(|(file, _)| **file == *name);
        let text = match changed {
            Some((_, text)) => text.clone(),
            None => fs::read_to_string(source).map_err(|error| error.to_string())?,
        };
        let mut hasher = DefaultHasher::new();
        (self.headers, &text, flags).hash(&mut hasher);
        let object = self.cache.join(format!("{name}-{:016x}.o", hasher.finish()));
        if object.exists() {
            return Ok(object);
        }
        let mut source = source.to_owned();
        if changed.is_some() {
            source = object.with_extension("cu");
            fs::write(&source, text).map_err(|error| error.to_string())?;
        }
        let mut command = Command::new("g++");
        command.args(&self.flags).arg("-I").arg(&self.sources).arg("-I").arg(&self.kernels);
        command.args(flags).arg("-c").arg(&source);
        output(command, &object)?;
        Ok(object)
    }

    /// The libraries of these objects, in a folder named after all of them.
    fn link(&self, objects: &Objects) -> Result<PathBuf, String> {
        let mut hasher = DefaultHasher::new();
        // Raised with every change of how they are linked.
        (1, objects).hash(&mut hasher);
        let folder = self.cache.join(format!("{:016x}", hasher.finish()));
        fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        for part in PARTS {
            let library = folder.join(part.library);
            if library.exists() {
                continue;
            }
            let mut command = Command::new("g++");
            command.args(&self.flags).arg("-shared");
            command.args(objects.iter().filter(|(of, _)| *of == part.library).map(|(_, o)| o));
            // Without a version: whoever looks for that name first, as cudarc does, gets this library
            // and not the driver's, if there is one.
            let name = part.library.rsplit_once('.').map_or(part.library, |(name, _)| name);
            command.arg(format!("-Wl,-soname,{name}"));
            command.arg("-L").arg(&folder).args(part.needs);
            if part.library == DRIVER {
                command.arg(format!("-Wl,-T,{}", self.sources.join("shared.ld").display()));
            }
            output(command, &library)?;
        }
        Ok(folder)
    }
}

/// Runs a compiler whose output appears only when it is complete.
fn output(mut command: Command, file: &Path) -> Result<(), String> {
    let partial = file.with_extension("partial");
    let ran = command.arg("-o").arg(&partial).output();
    let ran = ran.map_err(|error| format!("g++ cannot be run: {error}"))?;
    if !ran.status.success() {
        let text = String::from_utf8_lossy(&ran.stderr).into_owned();
        return Err(format!("g++ does not compile {}:\n{text}", file.display()));
    }
    fs::rename(&partial, file).map_err(|error| error.to_string())
}

/// The files of a folder with one of these extensions, in order.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| {
        file.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted))
    });
    files.sort();
    Ok(files)
}
