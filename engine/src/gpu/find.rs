//! Finding a GPU.

use std::path::PathBuf;
use std::sync::Arc;

use baton_kernels::cuda::{Device, DeviceError, Libraries, LibraryPaths, Missing, Nccl};

/// Why there is no GPU. Displayed on one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The driver's libraries are not here.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// There is no such device, or it does not work.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Opens the GPU of this number, with libraries that are looked for in `folders` first, then in the
/// active Python environment and in the system.
///
/// # Errors
/// If there is none.
pub fn open(ordinal: usize, folders: &[PathBuf]) -> Result<Arc<Device>, Unavailable> {
    Ok(Device::open(&Libraries::find(&paths(folders))?, ordinal)?)
}

/// Finds what several GPUs need to compute together, in the same places. They were opened before.
///
/// # Errors
/// If it is not there.
pub fn find_nccl(folders: &[PathBuf]) -> Result<Arc<Nccl>, Unavailable> {
    Ok(Nccl::find(&paths(folders))?)
}

fn paths(folders: &[PathBuf]) -> LibraryPaths {
    LibraryPaths { folders: folders.to_vec(), ..LibraryPaths::from_environment() }
}
