//! Finding the libraries of the driver and of CUDA at run time.

use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};

use cudarc::cublaslt::sys as blas_sys;
use cudarc::driver::sys;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::symbols::{BLAS_SYMBOLS, DRIVER_SYMBOLS};

/// The oldest driver that loads the kernels which are built in, as `cuDriverGetVersion` says it.
const OLDEST_DRIVER: i32 = 13_000;
/// Where a toolkit is installed by default.
const TOOLKIT: &str = "/usr/local/cuda/lib64";

/// Where to look for libraries besides the system's own places. What is in a folder here counts, and
/// has to work; else it is the first that has everything: what the system's loader finds, then
/// Python's packages, then a toolkit's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LibraryPaths {
    /// Folders with libraries, the first one first.
    pub folders: Vec<PathBuf>,
    /// Python environments with NVIDIA's packages.
    pub environments: Vec<PathBuf>,
}

impl LibraryPaths {
    /// No folders, and the Python environment that is active (`VIRTUAL_ENV`, `CONDA_PREFIX`).
    #[must_use]
    pub fn from_environment() -> Self {
        let named = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os);
        Self { folders: Vec::new(), environments: named.map(PathBuf::from).collect() }
    }

    /// The library of this name that somebody chose.
    fn chosen(&self, name: &str) -> Option<PathBuf> {
        self.folders.iter().map(|folder| folder.join(name)).find(|file| file.exists())
    }

    /// Files that may be the library of this name, in the order in which they are tried.
    fn candidates(&self, name: &str) -> Vec<PathBuf> {
        if let Some(file) = self.chosen(name) {
            return vec![file];
        }
        let packages =
            self.environments.iter().flat_map(|environment| package_folders(environment));
        let packages = packages.map(|folder| folder.join(name)).filter(|file| file.exists());
        // Without a folder: as the system's loader finds it.
        let system = std::iter::once(PathBuf::from(name));
        system.chain(packages).chain([Path::new(TOOLKIT).join(name)]).collect()
    }
}

/// `lib/python3.*/site-packages/nvidia/*/lib` of a Python environment.
fn package_folders(environment: &Path) -> Vec<PathBuf> {
    let entries = |folder: PathBuf| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let versions = entries(environment.join("lib")).into_iter().filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"))
    });
    versions
        .flat_map(|version| entries(version.join("site-packages/nvidia")))
        .map(|package| package.join("lib"))
        .collect()
}

/// Why devices cannot be used. Displayed on one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// A library is nowhere, or cannot be loaded.
    #[error("{library} not found ({reason})")]
    Library {
        /// Its file name.
        library: &'static str,
        /// What the loader said about each place.
        reason: String,
    },
    /// A library is too old.
    #[error("{library} from {path} has no {symbol}: CUDA 13.0 or newer is needed")]
    Symbol {
        /// Its file name.
        library: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What it lacks.
        symbol: &'static str,
    },
    /// The driver is too old.
    #[error("the driver supports CUDA {}.{}, and 13.0 is needed", version / 1000, version % 1000 / 10)]
    OldDriver {
        /// As `cuDriverGetVersion` says it.
        version: i32,
    },
    /// Another copy of the library is found by its name, as with the stubs of a toolkit.
    #[error("{library} from {path} is hidden by another one in LD_LIBRARY_PATH or loaded before")]
    Ambiguous {
        /// Its file name.
        library: &'static str,
        /// Where it is.
        path: PathBuf,
    },
}

/// The libraries that devices need, loaded for the rest of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libraries {
    /// The driver's library.
    pub driver: PathBuf,
    /// Its version, as `cuDriverGetVersion` says it: 1000 major + 10 minor.
    pub driver_version: i32,
    /// cuBLASLt.
    pub blas: PathBuf,
}

impl Libraries {
    /// Loads the libraries.
    ///
    /// # Errors
    /// If one is missing or too old, on one line.
    pub fn find(paths: &LibraryPaths) -> Result<Self, Missing> {
        let driver = Self::driver_alone(paths)?;
        Ok(Self { blas: find_blas(paths)?, ..driver })
    }

    /// Loads the driver's library alone, for what multiplies no matrices.
    pub(super) fn driver_alone(paths: &LibraryPaths) -> Result<Self, Missing> {
        let (driver, library) = load("libcuda.so.1", paths, DRIVER_SYMBOLS)?;
        // cudarc looks for libraries by name, and panics where it finds none. So it must find these.
        // SAFETY: loads a library that is loaded already.
        let found = unsafe { sys::is_culib_present().then(|| sys::culib()) };
        // Another one is a toolkit's, which has functions that do nothing.
        if !found.is_some_and(|found| is_same(&library, found, DRIVER_SYMBOLS[0])) {
            return Err(Missing::Ambiguous { library: "libcuda.so.1", path: driver });
        }
        let mut driver_version = 0;
        // SAFETY: writes one integer. A failure leaves 0.
        let _ = unsafe { sys::cuDriverGetVersion(&raw mut driver_version) };
        if driver_version < OLDEST_DRIVER {
            return Err(Missing::OldDriver { version: driver_version });
        }
        Ok(Self { driver, driver_version, blas: PathBuf::new() })
    }
}

/// Loads cuBLASLt, and gives the file of the one that is called. That is cudarc's, which looks for
/// the name without a version first: if a toolkit has installed it, another one than ours.
fn find_blas(paths: &LibraryPaths) -> Result<PathBuf, Missing> {
    const NAME: &str = "libcublasLt.so.13";
    let (path, library) = load(NAME, paths, BLAS_SYMBOLS)?;
    // SAFETY: loads a library, which NVIDIA's may be at any time.
    let found = unsafe { blas_sys::is_culib_present().then(|| blas_sys::culib()) };
    let ambiguous = || Missing::Ambiguous { library: NAME, path: path.clone() };
    let found = found.ok_or_else(ambiguous)?;
    if is_same(&library, found, BLAS_SYMBOLS[0]) {
        return Ok(path);
    }
    let other = file_of(address_in(found, BLAS_SYMBOLS[0]));
    let other = other.and_then(|file| file.canonicalize().ok()).ok_or_else(ambiguous)?;
    let version = other.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NAME));
    let complete = BLAS_SYMBOLS.iter().all(|symbol| !address_in(found, symbol).is_null());
    let does = version && complete && paths.chosen(NAME).is_none();
    does.then_some(other).ok_or_else(ambiguous)
}

/// Loads a library for good, so that it is found by its name from now on. Gives its file.
pub(super) fn load(
    name: &'static str,
    paths: &LibraryPaths,
    symbols: &[&'static CStr],
) -> Result<(PathBuf, Library), Missing> {
    let (mut reasons, mut lacking) = (Vec::new(), None);
    for file in paths.candidates(name) {
        // SAFETY: NVIDIA's libraries may be loaded at any time.
        match unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL | libc::RTLD_NODELETE) } {
            Ok(library) => {
                let path = file_of(address(&library, symbols[0])).unwrap_or(file);
                let missing = symbols.iter().find(|symbol| address(&library, symbol).is_null());
                let Some(symbol) = missing else { return Ok((path, library)) };
                let symbol = symbol.to_str().expect("names of functions are ASCII");
                lacking.get_or_insert(Missing::Symbol { library: name, path, symbol });
            }
            Err(error) => reasons.push(one_line(&error)),
        }
    }
    Err(lacking.unwrap_or(Missing::Library { library: name, reason: reasons.join("; ") }))
}

fn one_line(error: &libloading::Error) -> String {
    use std::error::Error;
    let text = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    text.replace('\n', " ")
}

/// Whether a function of two handles is the same.
fn is_same(library: &Library, other: &libloading::Library, symbol: &CStr) -> bool {
    address_in(other, symbol) == address(library, symbol)
}

/// Where a function of a library that cudarc has loaded is, null if there is none.
fn address_in(library: &libloading::Library, symbol: &CStr) -> *mut c_void {
    // SAFETY: the address is compared and looked up only.
    unsafe { library.get::<*mut c_void>(symbol) }.map_or(std::ptr::null_mut(), |found| *found)
}

/// Where a function is, null if there is none.
fn address(library: &Library, symbol: &CStr) -> *mut c_void {
    // SAFETY: the address is compared and looked up only.
    unsafe { library.get::<*mut c_void>(symbol) }.map_or(std::ptr::null_mut(), |found| *found)
}

/// The file that a function was loaded from.
fn file_of(address: *mut c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: all zeros are a valid `Dl_info`, which `dladdr` fills in.
    let info = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        (libc::dladdr(address, &raw mut info) != 0).then_some(info)?
    };
    if info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: a string of the loader, for as long as the library is loaded.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes())))
}
