//! NCCL: messages and sums between devices, of one process or several, on one machine or several.
//!
//! Bound here and not by cudarc, which does not find the library under the name that NVIDIA's
//! packages give it, and panics where communicators fail.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::Arc;

use libloading::os::unix::Library;

use super::library::{LibraryPaths, Missing, load};

mod communicator;
mod joining;
mod shared;

pub use communicator::{Communicator, Reducible};
pub use shared::Abort;

/// The oldest version with communicators that do not block.
const OLDEST: i32 = 21_400;

/// What rank 0 gives all others, over whatever connects them already, to find each other.
pub type UniqueId = [u8; 128];

/// As it is passed: by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawId([u8; 128]);

type Handle = *mut c_void;

/// `ncclConfig_t` as of 2.14. The library takes later fields' defaults.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Config {
    const MAGIC: u32 = 0xcafe_beef;

    /// Of communicators whose calls return at once.
    fn not_blocking() -> Self {
        Self { size: size_of::<Self>(), magic: Self::MAGIC, version: OLDEST as u32, blocking: 0 }
    }
}

/// Why NCCL did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// Another rank is gone, or the network between. The communicator can only be dropped.
    #[error("a peer is gone: {call}: {error}")]
    PeerLost {
        /// The function.
        call: &'static str,
        /// The library's explanation.
        error: String,
    },
    /// It did not happen in time. The communicator can only be dropped.
    #[error("{call} was not done in time")]
    TimedOut {
        /// The function.
        call: &'static str,
    },
    /// Anything else: wrong arguments, or a device that fails.
    #[error("{call}: {error}")]
    Refused {
        /// The function.
        call: &'static str,
        /// The library's explanation.
        error: String,
    },
}

/// Declares the functions that are used, as a table that is filled from the library.
macro_rules! functions {
    ($($name:ident: $symbol:literal, ($($argument:ty),*) -> $result:ty;)*) => {
        /// NCCL's functions, as `nccl.h` declares them.
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        const SYMBOLS: &[&CStr] = &[$($symbol),*];

        impl Functions {
            /// None if one is missing; `load` has said which by then.
            fn of(library: &Library) -> Option<Self> {
                // SAFETY: the signatures are those of `nccl.h`; the library stays loaded.
                unsafe { Some(Self { $($name: *library.get($symbol).ok()?,)* }) }
            }
        }
    };
}

functions! {
    version: c"ncclGetVersion", (*mut c_int) -> c_int;
    error: c"ncclGetErrorString", (c_int) -> *const c_char;
    unique_id: c"ncclGetUniqueId", (*mut RawId) -> c_int;
    join: c"ncclCommInitRankConfig", (*mut Handle, c_int, RawId, c_int, *mut Config) -> c_int;
    join_all: c"ncclCommInitAll", (*mut Handle, c_int, *const c_int) -> c_int;
    state: c"ncclCommGetAsyncError", (Handle, *mut c_int) -> c_int;
    finalize: c"ncclCommFinalize", (Handle) -> c_int;
    destroy: c"ncclCommDestroy", (Handle) -> c_int;
    abort: c"ncclCommAbort", (Handle) -> c_int;
    group_start: c"ncclGroupStart", () -> c_int;
    group_end: c"ncclGroupEnd", () -> c_int;
    send: c"ncclSend", (*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    receive: c"ncclRecv", (*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    all_reduce: c"ncclAllReduce",
        (*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    all_gather: c"ncclAllGather",
        (*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;
}

/// The library.
pub struct Nccl {
    functions: Functions,
    path: PathBuf,
    version: i32,
}

impl Nccl {
    /// Loads the library. The driver's must have been found before.
    ///
    /// # Errors
    /// If it is missing or too old, on one line.
    pub fn find(paths: &LibraryPaths) -> Result<Arc<Self>, Missing> {
        let library = "libnccl.so.2";
        let (path, handle) = load(library, paths, SYMBOLS)?;
        let lacks = |symbol| Missing::Symbol { library, path: path.clone(), symbol };
        let functions = Functions::of(&handle).ok_or_else(|| lacks("all that is needed"))?;
        let mut version = 0;
        // SAFETY: writes one integer. A failure leaves 0.
        let _ = unsafe { (functions.version)(&raw mut version) };
        if version < OLDEST {
            return Err(lacks("communicators that do not block"));
        }
        Ok(Arc::new(Self { functions, path, version }))
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// 10000 major + 100 minor + patch.
    #[must_use]
    pub fn version(&self) -> i32 {
        self.version
    }

    /// A new identifier, for one communicator.
    ///
    /// # Errors
    /// If the library fails.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = RawId([0; 128]);
        // SAFETY: writes 128 bytes.
        let status = unsafe { (self.functions.unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", status).map(|_| id.0)
    }

    /// Turns a status into whether the call is complete.
    fn check(&self, call: &'static str, status: c_int) -> Result<bool, NcclError> {
        match status {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            SYSTEM_ERROR | REMOTE_ERROR => {
                Err(NcclError::PeerLost { call, error: self.explain(status) })
            }
            _ => Err(NcclError::Refused { call, error: self.explain(status) }),
        }
    }

    fn explain(&self, status: c_int) -> String {
        // SAFETY: gives a constant string for any number.
        let text = unsafe { CStr::from_ptr((self.functions.error)(status)) };
        text.to_string_lossy().into_owned()
    }
}

/// `ncclResult_t`.
const SUCCESS: c_int = 0;
const SYSTEM_ERROR: c_int = 2;
const REMOTE_ERROR: c_int = 6;
const IN_PROGRESS: c_int = 7;
