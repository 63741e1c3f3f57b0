//! Work that keeps a processor busy for a while, such as tokenizing: it is done beside the tasks that serve
//! everybody.

use std::sync::Arc;
use std::thread::available_parallelism;

use tokio::sync::Semaphore;

use super::refusal::Refusal;
use crate::core::SubmitError;

/// Work on more text than this waits for its turn: it takes long, and some 30 times the text's memory.
const LONG_TEXT_BYTES: usize = 64 << 10;

/// Does as much long work at a time as there are processors. Short work never waits for it. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Computing {
    turns: Arc<Semaphore>,
}

impl Default for Computing {
    fn default() -> Self {
        let processors = available_parallelism().map_or(1, usize::from);
        Self { turns: Arc::new(Semaphore::new(processors)) }
    }
}

impl Computing {
    /// What comes of work on so many bytes of text. It cannot be stopped: if nobody waits any more, it
    /// still has its turn until it ends.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        text_bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let turn = if text_bytes > LONG_TEXT_BYTES {
            let turn = self.turns.clone().acquire_owned().await;
            Some(turn.expect("nobody closes it"))
        } else {
            None
        };
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        done.await.map_err(|error| match error.is_panic() {
            true => Refusal::Internal,
            false => SubmitError::ShuttingDown.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use tonic::Code;

    use super::*;
    use crate::front::fixtures::{in_time, until};

    #[tokio::test]
    async fn long_work_waits_for_long_work_and_short_work_for_none() {
        let computing = Computing { turns: Arc::new(Semaphore::new(1)) };
        let (end, ended) = channel::<()>();
        let long = computing.clone();
        let asker = tokio::spawn(async move {
            long.run(LONG_TEXT_BYTES + 1, move || ended.recv().unwrap()).await
        });
        until(async || (computing.turns.available_permits() == 0).then_some(())).await;
        // It goes on although nobody waits for it.
        asker.abort();
        assert!(asker.await.unwrap_err().is_cancelled());
        assert_eq!(in_time(computing.run(LONG_TEXT_BYTES, || 1)).await.unwrap(), 1);
        assert_eq!(computing.turns.available_permits(), 0);
        end.send(()).unwrap();
        assert_eq!(in_time(computing.run(LONG_TEXT_BYTES + 1, || 2)).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_gives_its_turn_back() {
        let computing = Computing { turns: Arc::new(Semaphore::new(1)) };
        for _ in 0..2 {
            let panicking = computing.run(LONG_TEXT_BYTES + 1, || panic!("on purpose"));
            let refused: Result<(), _> = in_time(panicking).await;
            assert_eq!(refused.unwrap_err().code(), Code::Internal);
        }
    }
}
