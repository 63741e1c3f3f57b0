//! Which life of a node this is.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use baton_proto::ids::Epoch;

const FILE: &str = "epoch";

/// The epoch of a start at `now_ms` (milliseconds since 1970): the time, or one more than the last
/// epoch if the clock went back. Without a state folder only the clock orders the epochs.
pub fn next_epoch(state: Option<&Path>, now_ms: u64) -> io::Result<Epoch> {
    let Some(state) = state else {
        return Ok(Epoch(now_ms));
    };
    std::fs::create_dir_all(state)?;
    let last = match std::fs::read_to_string(state.join(FILE)) {
        Ok(text) => parse(&text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let epoch = now_ms.max(last + 1);
    // Renamed into place once it is on the disk, so that a crash, of the machine too, leaves the old
    // number or the new one, and not an empty file.
    let temporary = state.join("epoch.new");
    let mut file = File::create(&temporary)?;
    file.write_all(epoch.to_string().as_bytes())?;
    file.sync_all()?;
    std::fs::rename(temporary, state.join(FILE))?;
    Ok(Epoch(epoch))
}

fn parse(text: &str) -> io::Result<u64> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the epoch file holds no number");
    text.trim().parse().ok().filter(|epoch| *epoch < u64::MAX).ok_or_else(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_even_if_the_clock_goes_back() {
        let state = tempfile::tempdir().expect("a folder");
        let mut last = Epoch(0);
        for now in [1000, 1000, 10, 5000] {
            let epoch = next_epoch(Some(state.path()), now).expect("writable");
            assert!(epoch > last && epoch.0 >= now);
            last = epoch;
        }
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let state = tempfile::tempdir().expect("a folder");
        std::fs::write(state.path().join(FILE), "x").expect("writable");
        assert_eq!(
            next_epoch(Some(state.path()), 1).expect_err("damaged").kind(),
            io::ErrorKind::InvalidData
        );
    }
}
