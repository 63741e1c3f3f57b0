//! GPUs, their driver and CUDA's libraries.

use std::path::PathBuf;

use baton_kernels::cuda::{LibraryPaths, Probe, probe};

use super::report::Finding;

/// What the configuration names, so that it has to be there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    /// A GPU.
    pub(super) gpu: bool,
    /// Several GPUs for one model, or NCCL as a way for KV.
    pub(super) nccl: bool,
}

pub(super) fn findings(folders: &[PathBuf], wanted: Wanted) -> Vec<Finding> {
    let folders = folders.to_vec();
    judge(&probe(&LibraryPaths { folders, ..LibraryPaths::from_environment() }), wanted)
}

fn judge(probe: &Probe, wanted: Wanted) -> Vec<Finding> {
    let what = "GPU";
    let lacks = |found: String, remedy: &str| match wanted.gpu {
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
    findings.extend(nccl(probe, wanted));
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

/// NCCL, where one card alone would not do.
fn nccl(probe: &Probe, wanted: Wanted) -> Option<Finding> {
    let what = "NCCL";
    let missing = match &probe.nccl {
        Ok((version, path)) => {
            let (major, minor, patch) = (version / 10_000, version % 10_000 / 100, version % 100);
            let found = format!("{major}.{minor}.{patch} from {}", path.display());
            return Some(Finding::fine(what, found));
        }
        Err(missing) => missing.to_string(),
    };
    let remedy = "`pip install nvidia-nccl-cu13`, or name its folder with cuda_libraries";
    let several = probe.devices.as_ref().is_ok_and(|devices| devices.len() > 1);
    match wanted.nccl {
        true => Some(Finding::problem(what, missing, remedy)),
        false => several.then(|| Finding::note(what, missing, remedy)),
    }
}

#[cfg(test)]
mod tests {
    use baton_kernels::cuda::{DeviceReport, Libraries, Missing};

    use super::super::report::Verdict;
    use super::*;

    /// A machine with the libraries, without NCCL, and with these cards.
    fn machine(devices: Vec<DeviceReport>) -> Probe {
        let libraries = Libraries {
            driver: "libcuda.so.1".into(),
            driver_version: 13_000,
            blas: "libcublasLt.so.13".into(),
        };
        let nccl = probe(&LibraryPaths { folders: Vec::new(), environments: Vec::new() }).nccl;
        Probe { libraries: Ok(libraries), nccl, devices: Ok(devices) }
    }

    fn card(ordinal: usize, problem: Option<&str>) -> DeviceReport {
        DeviceReport {
            ordinal,
            name: "Card".to_owned(),
            capability: (9, 0),
            memory_bytes: 1 << 34,
            multiprocessors: 80,
            problem: problem.map(str::to_owned),
        }
    }

    #[test]
    fn a_card_that_cannot_be_used_is_a_problem_for_who_wants_it() {
        let probe = machine(vec![card(0, Some("too old"))]);
        let problems = |gpu| {
            let found = judge(&probe, Wanted { gpu, nccl: false });
            found.iter().filter(|finding| finding.is_problem()).count()
        };
        assert_eq!((problems(true), problems(false)), (1, 0));
        assert!(judge(&probe, Wanted::default())[0].found.starts_with("for CUDA 13.0"));
    }

    #[test]
    fn several_cards_and_a_way_for_kv_want_nccl() {
        let missing = || {
            let reason = "nowhere".to_owned();
            Err(Missing::Library { library: "libnccl.so.2", reason })
        };
        let verdict = |cards: usize, nccl, wanted| {
            let cards = (0..cards).map(|ordinal| card(ordinal, None)).collect();
            let probe = Probe { nccl, ..machine(cards) };
            let found = judge(&probe, Wanted { gpu: true, nccl: wanted });
            found.into_iter().find(|finding| finding.what == "NCCL")
        };
        assert_eq!(verdict(1, missing(), false), None);
        let note = verdict(2, missing(), false).expect("told");
        let problem = verdict(1, missing(), true).expect("told");
        assert_eq!((note.verdict, problem.verdict), (Verdict::Note, Verdict::Problem));
        assert!(problem.remedy.contains("nvidia-nccl"), "{problem:?}");
        let there = verdict(1, Ok((22_703, "/lib/libnccl.so.2".into())), false).expect("told");
        assert_eq!(there, Finding::fine("NCCL", "2.27.3 from /lib/libnccl.so.2"));
    }
}
