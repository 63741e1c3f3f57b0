//! Finding a GPU.

use std::path::PathBuf;
use std::sync::Arc;

use baton_kernels::cuda::{Device, DeviceError, Libraries, LibraryPaths, Missing};

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
    let paths = LibraryPaths { folders: folders.to_vec(), ..LibraryPaths::from_environment() };
    Ok(Device::open(&Libraries::find(&paths)?, ordinal)?)
}
