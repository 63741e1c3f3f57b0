//! Loading the model, with progress for people on standard error.

use std::io::Write;
use std::time::{Duration, Instant};

use baton_engine::model::{LoadError, LoadFormat, LoadOptions, LoadProgress, Model};

use crate::config::{self, Config};

/// The seed of made-up weights: equal on all nodes, which then can exchange KV.
const DUMMY_SEED: u64 = 0;

/// Least time between two lines of progress.
const PROGRESS_PAUSE: Duration = Duration::from_millis(500);

/// Loads the configured model. Blocks for as long as that takes.
pub(crate) fn load(config: &Config) -> Result<Model, LoadError> {
    let begun = Instant::now();
    let mut shown = begun;
    Model::load(LoadOptions {
        dir: &config.model,
        format: match config.load_format {
            config::LoadFormat::Safetensors => LoadFormat::Safetensors,
            config::LoadFormat::Dummy => LoadFormat::Dummy { seed: DUMMY_SEED },
        },
        threads: config.threads,
        max_model_len: config.max_model_len,
        kv_dtype: config.kv_dtype,
        on_progress: &mut |LoadProgress { done_bytes, total_bytes }| {
            if done_bytes == total_bytes || shown.elapsed() >= PROGRESS_PAUSE {
                shown = Instant::now();
                let percent = percent(done_bytes, total_bytes);
                let line = line(percent, done_bytes, begun.elapsed());
                // Nobody may be reading.
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        },
    })
}

fn percent(done: usize, total: usize) -> usize {
    (done as u128 * 100 / total.max(1) as u128) as usize
}

/// For example `loading 42 %, 1.25 GB/s`.
fn line(percent: usize, done_bytes: usize, elapsed: Duration) -> String {
    let speed = done_bytes as f64 / elapsed.as_secs_f64().max(1e-9) / 1e9;
    format!("loading {percent} %, {speed:.2} GB/s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_share_and_speed() {
        assert_eq!(percent(usize::MAX / 2, usize::MAX), 49);
        assert_eq!(percent(0, 0), 0);
        assert_eq!(line(50, 5 << 30, Duration::from_secs(2)), "loading 50 %, 2.68 GB/s");
    }
}
