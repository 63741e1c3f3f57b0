//! What there is to compute with, for people and for logs.

use std::fmt;
use std::path::PathBuf;

use super::device::Device;
use super::error::DeviceError;
use super::library::{Libraries, LibraryPaths, Missing};
use super::nccl::Nccl;

/// What was found on this machine.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The libraries, or what is missing.
    pub libraries: Result<Libraries, Missing>,
    /// Version and file of NCCL, which only several devices need, or what is missing.
    pub nccl: Result<(i32, PathBuf), Missing>,
    /// The devices, or why the driver does not work. Empty without libraries.
    pub devices: Result<Vec<DeviceReport>, DeviceError>,
}

/// A device, as found without opening it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its number.
    pub ordinal: usize,
    /// The driver's name of it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Its memory.
    pub memory_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// Looks for libraries and devices. Takes no memory of a device.
#[must_use]
pub fn probe(paths: &LibraryPaths) -> Probe {
    let libraries = Libraries::find(paths);
    let devices = match &libraries {
        Ok(libraries) => devices(libraries),
        Err(_) => Ok(Vec::new()),
    };
    let nccl = libraries.clone().and_then(|_| Nccl::find(paths));
    let nccl = nccl.map(|nccl| (nccl.version(), nccl.path().to_owned()));
    Probe { libraries, nccl, devices }
}

fn devices(libraries: &Libraries) -> Result<Vec<DeviceReport>, DeviceError> {
    let count = Device::count(libraries)?;
    (0..count)
        .map(|ordinal| {
            let facts = super::device::Facts::of(ordinal)?;
            let problem = facts.images().err().map(|error| error.to_string());
            Ok(DeviceReport {
                ordinal,
                name: facts.name,
                capability: facts.capability,
                memory_bytes: facts.memory_bytes,
                multiprocessors: facts.multiprocessors,
                problem,
            })
        })
        .collect()
}

impl fmt::Display for Probe {
    /// A line for each library and device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.libraries {
            Err(missing) => write!(f, "no GPU: {missing}"),
            Ok(Libraries { driver, driver_version, blas }) => {
                let (major, minor) = (driver_version / 1000, driver_version % 1000 / 10);
                writeln!(f, "driver for CUDA {major}.{minor} from {}", driver.display())?;
                write!(f, "cuBLASLt from {}", blas.display())?;
                match &self.nccl {
                    Err(missing) => write!(f, "\nno NCCL: {missing}")?,
                    Ok((version, path)) => write!(f, "\nNCCL {version} from {}", path.display())?,
                }
                match &self.devices {
                    Err(error) => write!(f, "\nno GPU: {error}"),
                    Ok(devices) if devices.is_empty() => write!(f, "\nno GPU"),
                    Ok(devices) => devices.iter().try_for_each(|device| write!(f, "\n{device}")),
                }
            }
        }
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ordinal, name, capability: (major, minor), .. } = self;
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        write!(f, "device {ordinal}: {name}, compute capability {major}.{minor}, {gib:.1} GiB, ")?;
        write!(f, "{} multiprocessors", self.multiprocessors)?;
        self.problem.iter().try_for_each(|problem| write!(f, "; {problem}"))
    }
}
