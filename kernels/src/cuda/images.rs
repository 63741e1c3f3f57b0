//! The binaries of the kernels, built by `scripts/build-kernels` and committed.

use super::error::DeviceError;

/// Which devices a binary is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Machine code with Hopper's own instructions; runs on compute capability 9.0 only.
    Hopper,
    /// PTX that the driver compiles for Ampere and everything later.
    Portable,
}

impl Target {
    /// The best one for a device.
    #[must_use]
    pub fn of(capability: (u32, u32)) -> Self {
        if capability == (9, 0) { Self::Hopper } else { Self::Portable }
    }
}

/// The kernels of one source file for one target.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Name of the binary.
    pub file: &'static str,
    /// Which devices it is for.
    pub target: Target,
    /// A cubin, or PTX.
    pub bytes: &'static [u8],
}

include!("../../cuda/cubin/images.rs");

/// The images for a device.
///
/// # Errors
/// If it is too old.
pub(super) fn images_for(
    capability: (u32, u32),
) -> Result<impl Iterator<Item = &'static Image>, DeviceError> {
    if capability < (8, 0) {
        let (major, minor) = capability;
        let text = format!("compute capability {major}.{minor} is too old: 8.0 is needed");
        return Err(DeviceError::Unsupported(text));
    }
    let target = Target::of(capability);
    Ok(IMAGES.iter().filter(move |image| image.target == target))
}
