//! [`Marks`]: where in a stream the copies end that somebody will wait for.

use std::collections::VecDeque;

use baton_kernels::cuda::{DeviceError, Event, Stream};

/// Ends of copies that have begun, in their order.
#[derive(Default)]
pub(super) struct Marks {
    begun: VecDeque<Event>,
    /// Of copies that have ended, to be used again.
    idle: Vec<Event>,
}

impl Marks {
    /// Everything that was queued so far belongs to the copy that has begun.
    pub(super) fn set(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        let event = match self.idle.pop() {
            Some(event) => event,
            None => Event::blocking(stream.device())?,
        };
        event.record(stream)?;
        self.begun.push_back(event);
        Ok(())
    }

    /// Waits for the oldest copy that has begun.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn wait(&mut self) -> Result<(), DeviceError> {
        let event = self.begun.pop_front().expect("a copy has begun");
        event.synchronize()?;
        self.idle.push(event);
        Ok(())
    }
}
