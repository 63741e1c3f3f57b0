//! GPUs, their driver and CUDA's libraries.

use std::path::PathBuf;

use baton_kernels::cuda::{LibraryPaths, Probe, probe};

use super::report::Finding;

/// `wanted`: the configuration names a GPU.
pub(super) fn findings(folders: &[PathBuf], wanted: bool) -> Vec<Finding> {
    let folders = folders.to_vec();
    judge(&probe(&LibraryPaths { folders, ..LibraryPaths::from_environment() }), wanted)
}

fn judge(probe: &Probe, wanted: bool) -> Vec<Finding> {
    let what = "GPU";
    let lacks = |found: String, remedy: &str| match wanted {
        true => Finding::problem(what, found, remedy),
        false => Finding::note(what, found, remedy),
    };
    let libraries = match &probe.libraries {
        Ok(libraries) => libraries,
        Err(missing) => {
            let remedy = "nodes compute on the CPU; for a GPU install NVIDIA's driver, and \
                          cuBLASLt of CUDA 13 (`pip install nvidia-cublas`)";
            return vec![lacks(missing.to_string(), remedy)];
        }
    };
    let version = libraries.driver_version;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    let driver = format!("for CUDA {major}.{minor}; cuBLASLt from {}", libraries.blas.display());
    let mut findings = vec![Finding::fine("GPU driver", driver)];
    match &probe.devices {
        Err(error) => {
            findings.push(lacks(error.to_string(), "see that `nvidia-smi` works for this user"));
        }
        Ok(devices) if devices.is_empty() => {
            let remedy = "is a card plugged in, and visible (CUDA_VISIBLE_DEVICES)?";
            findings.push(lacks("none".to_owned(), remedy));
        }
        Ok(devices) => findings.extend(devices.iter().map(|device| match &device.problem {
            None => Finding::fine(what, device.to_string()),
            Some(_) => lacks(device.to_string(), "this card cannot be used; take another"),
        })),
    }
    findings
}

#[cfg(test)]
mod tests {
    use baton_kernels::cuda::{DeviceReport, Libraries};

    use super::*;

    #[test]
    fn a_card_that_cannot_be_used_is_a_problem_for_who_wants_it() {
        let libraries = Libraries {
            driver: "libcuda.so.1".into(),
            driver_version: 13_000,
            blas: "libcublasLt.so.13".into(),
        };
        let device = DeviceReport {
            ordinal: 0,
            name: "Old".to_owned(),
            capability: (7, 0),
            memory_bytes: 1 << 34,
            multiprocessors: 80,
            problem: Some("too old".to_owned()),
        };
        let nccl = probe(&LibraryPaths { folders: Vec::new(), environments: Vec::new() }).nccl;
        let probe = Probe { libraries: Ok(libraries), nccl, devices: Ok(vec![device]) };
        let problems = |wanted| judge(&probe, wanted).iter().filter(|f| f.is_problem()).count();
        assert_eq!((problems(true), problems(false)), (1, 0));
        assert!(judge(&probe, true)[0].found.starts_with("for CUDA 13.0"));
    }
}
