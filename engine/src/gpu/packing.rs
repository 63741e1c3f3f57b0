//! [`Packing`]: the numbers of a step, collected to go to the device in one copy.

use std::ops::Range;
use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, Pinned, Slice, Stream};

/// Arrays begin at multiples of so many words: 16 bytes.
const ALIGNMENT: usize = 4;
/// Words that there is room for at first.
const FIRST_ROOM: usize = 1 << 12;

/// Arrays of words, one after the other.
#[derive(Default)]
pub(super) struct Packing {
    words: Vec<u32>,
}

impl Packing {
    pub(super) fn clear(&mut self) {
        self.words.clear();
    }

    /// Adds an array; where it will lie.
    pub(super) fn array(&mut self, values: impl IntoIterator<Item = u32>) -> Range<usize> {
        self.array_of(values, 0)
    }

    /// Adds an array with room for `len` words at least, the rest of them zeros.
    pub(super) fn array_of(
        &mut self,
        values: impl IntoIterator<Item = u32>,
        len: usize,
    ) -> Range<usize> {
        let start = self.words.len();
        self.words.extend(values);
        let end = self.words.len().max(start + len);
        self.words.resize(end.next_multiple_of(ALIGNMENT), 0);
        start..end
    }
}

/// Where packed numbers lie on the device.
pub(super) struct Inputs {
    device: Arc<Device>,
    buffer: Buffer<u32>,
    /// In turn, so that one is filled while the other one is copied.
    staged: [Pinned<u32>; 2],
    turn: usize,
}

impl Inputs {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let staged = || Pinned::new(device, FIRST_ROOM);
        Ok(Self {
            device: device.clone(),
            buffer: Buffer::new(device, FIRST_ROOM)?,
            staged: [staged()?, staged()?],
            turn: 0,
        })
    }

    /// Whether these numbers find room. If not, [`grow`](Self::grow) moves everything.
    pub(super) fn has_room(&self, packing: &Packing) -> bool {
        packing.words.len() <= self.buffer.len()
    }

    /// Makes room; what was captured with the old addresses is void. Waits for the device.
    pub(super) fn grow(&mut self, packing: &Packing) -> Result<(), DeviceError> {
        let room = packing.words.len().next_power_of_two();
        self.buffer = Buffer::new(&self.device, room)?;
        for staged in &mut self.staged {
            *staged = Pinned::new(&self.device, room)?;
        }
        Ok(())
    }

    /// Copies packed numbers to the device.
    pub(super) fn upload(&mut self, stream: &Stream, packing: &Packing) -> Result<(), DeviceError> {
        let Packing { words } = packing;
        let staged = &mut self.staged[self.turn];
        self.turn = (self.turn + 1) % 2;
        staged.as_mut_slice()?[..words.len()].copy_from_slice(words);
        stream.upload(staged, 0, self.buffer.slice(0..words.len()))
    }

    /// An array of the numbers that were copied last.
    pub(super) fn array(&self, range: &Range<usize>) -> Slice<'_, u32> {
        self.buffer.slice(range.clone())
    }
}
