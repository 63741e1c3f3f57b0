//! Reading and creating the files of an identity.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub(crate) const CA_CERT: &str = "ca.pem";
pub(crate) const CA_KEY: &str = "ca.key";
pub(crate) const NODE_CERT: &str = "node.pem";
pub(crate) const NODE_KEY: &str = "node.key";

/// Far above any PEM file that is meant.
const MAX_BYTES: u64 = 1 << 20;

/// A file of an identity cannot be read or created.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it; never its contents.
    pub what: String,
}

impl FileError {
    pub(crate) fn new(path: &Path, what: impl ToString) -> Self {
        Self { path: path.to_owned(), what: what.to_string() }
    }
}

/// Creates a folder, and those above it, that only its owner can enter.
pub(crate) fn create_private_dir(dir: &Path) -> Result<(), FileError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| FileError::new(dir, e))
}

/// Creates a file that must not exist yet.
pub(crate) fn create(path: &Path, mode: u32, contents: &str) -> Result<(), FileError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(contents.as_bytes()))
        .map_err(|e| FileError::new(path, e))
}

pub(crate) fn read(path: &Path) -> Result<String, FileError> {
    let fail = |e| FileError::new(path, e);
    let file = File::open(path).map_err(fail)?;
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(fail)?;
    Ok(text)
}

/// Reads a private key, unless every user of the machine could.
pub(crate) fn read_key(path: &Path) -> Result<String, FileError> {
    let mode = path.metadata().map_err(|e| FileError::new(path, e))?.mode();
    if mode & 0o007 != 0 {
        let what = format!("open to every user (mode {:o}); make it 600", mode & 0o777);
        return Err(FileError::new(path, what));
    }
    read(path)
}
