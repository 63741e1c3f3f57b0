//! Folders and files of a cluster on this machine.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Coordinator;
use super::error::{StartError, state_error};

/// The demo model that Baton comes with: `models/demo` in the folder of this program, in one
/// above it, or in the current folder or one above it.
pub fn bundled_model() -> Result<PathBuf, StartError> {
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    let candidates = program.ancestors().skip(1).chain(here.ancestors());
    candidates
        .map(|folder| folder.join("models/demo"))
        .find(|model| model.join("config.json").is_file())
        .ok_or_else(|| StartError::NoDemoModel(here.clone()))
}

/// Where the daemons are by default: beside this program.
pub(super) fn daemon_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program.parent().unwrap_or(Path::new("")).to_owned()
}

/// The folder for everything that the cluster writes, and what removes it if it is temporary.
pub(super) fn state_folder(
    given: Option<&Path>,
) -> Result<(PathBuf, Option<tempfile::TempDir>), StartError> {
    match given {
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(state_error(folder))?;
            Ok((folder.to_owned(), None))
        }
        None => {
            let made = tempfile::Builder::new().prefix("baton-").tempdir();
            let folder = made.map_err(state_error(&std::env::temp_dir()))?;
            Ok((folder.path().to_owned(), Some(folder)))
        }
    }
}

/// Removes what an earlier cluster left, if it did.
pub(super) fn remove(folder: &Path) -> Result<(), StartError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(state_error(folder)(error))
        }
        _ => Ok(()),
    }
}

/// `cluster.json`: addresses and process ids, for whoever wants to look or to interfere.
#[derive(Serialize)]
pub(super) struct StateFile<'a> {
    pub(super) grpc: SocketAddr,
    pub(super) http: SocketAddr,
    /// All of them; the first one's addresses are above as well.
    pub(super) coordinators: &'a [Coordinator],
    pub(super) processes: Vec<StateProcess<'a>>,
}

#[derive(Serialize)]
pub(super) struct StateProcess<'a> {
    pub(super) id: &'a str,
    pub(super) pid: u32,
    pub(super) log: &'a Path,
}

impl StateFile<'_> {
    pub(super) fn write(&self, folder: &Path) -> Result<(), StartError> {
        let text = serde_json::to_string_pretty(self).expect("plain data is JSON");
        let (path, temporary) = (folder.join("cluster.json"), folder.join("cluster.new"));
        std::fs::write(&temporary, text).map_err(state_error(&temporary))?;
        // Whoever waits for the file finds all of it.
        std::fs::rename(&temporary, &path).map_err(state_error(&path))
    }
}
