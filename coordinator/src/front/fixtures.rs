//! What the front's tests share.

use std::path::PathBuf;

use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Folder of the bundled demo model.
pub(crate) fn demo_model() -> PathBuf {
    root().join("models/demo")
}

/// A file of what transformers makes of text.
pub(crate) fn golden_text(file: &str) -> Value {
    let path = root().join("tests/golden/text").join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
