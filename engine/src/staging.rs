//! [`Staging`]: blocks in the memory of a device, read and written through page-locked memory.
//!
//! Each direction has a thread with a stream of its own and a ring of slots, each of which takes
//! one payload unit. The thread begins a copy as soon as there is a slot for it, and then waits
//! for the oldest; so copies follow each other without a gap, and there are never more of them
//! than slots. Nobody else waits: whoever asks gets a future.
//!
//! A copy that has begun comes to its end and keeps its lease and its slot until then, whatever
//! becomes of the transfer: so the blocks are given to nobody else meanwhile.
#![expect(unsafe_code, reason = "a device copies to and from slots while nobody touches them")]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use tokio::sync::oneshot;

use crate::lease::BlockLease;
use crate::memory::{MemoryLost, Soon};

/// Memory that a device can copy to and from. Its bytes stay where they are when it is moved.
pub trait PageLocked: AsRef<[u8]> + AsMut<[u8]> + Send + Sync {}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> PageLocked for T {}

/// Page-locked memory for one payload unit.
pub type Slot = Box<dyn PageLocked>;

/// Copies between the KV cache of a device and page-locked memory. Used by one thread.
pub trait Copies: Send + 'static {
    /// Begins to copy one layer of `blocks`, one after the other, to the beginning of `to`. What
    /// was told complete before is seen.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing else reads or writes `to`, and nothing writes
    /// to these pieces.
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut [u8],
    ) -> Result<(), MemoryLost>;

    /// Begins to copy pieces of `from` to one layer of blocks, given as pairs of (index of the
    /// piece in `from`, block). What computes after it was waited for sees it.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing writes to `from`, and nothing else reads or
    /// writes these pieces of the cache.
    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &[u8],
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost>;

    /// Waits for the oldest copy that was begun and not yet waited for.
    fn wait(&mut self) -> Result<(), MemoryLost>;
}

/// A handle of the threads that copy; they end when nobody has one, nor a slot, any more.
#[derive(Clone)]
pub struct Staging {
    piece_bytes: usize,
    out: Sender<Request>,
    into: Sender<Request>,
}

/// A direction's copies, and its ring of slots.
pub type Direction = (Box<dyn Copies>, Vec<Slot>);

impl Staging {
    /// Starts the threads of both directions, out of the device and into it. Each slot has room
    /// for a payload unit of pieces of `piece_bytes`.
    ///
    /// # Panics
    /// If the operating system has no threads.
    #[must_use]
    pub fn start(piece_bytes: usize, out: Direction, into: Direction) -> Self {
        let (out, into) = (start("kv-export", out), start("kv-import", into));
        Self { piece_bytes, out, into }
    }

    pub(crate) fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }

    /// One layer of the blocks `ordinals` of a lease.
    pub(crate) fn read(
        &self,
        lease: Arc<BlockLease>,
        layer: usize,
        ordinals: Range<usize>,
    ) -> Soon<Staged> {
        let (reply, read) = oneshot::channel();
        let bytes = ordinals.len() * self.piece_bytes;
        let (blocks, home) = (lease.block_ids(ordinals).to_vec(), self.out.clone());
        let request = Request::Room { for_read: Some((lease, layer, blocks)), bytes, home, reply };
        ask(&self.out, request, read)
    }

    /// A slot to be filled.
    pub(crate) fn room(&self, bytes: usize) -> Soon<Staged> {
        let (reply, room) = oneshot::channel();
        let home = self.into.clone();
        ask(&self.into, Request::Room { for_read: None, bytes, home, reply }, room)
    }

    /// Copies `pieces` of a filled slot, given as (index, block), to one layer of blocks of
    /// `lease`.
    pub(crate) fn apply(
        &self,
        lease: Arc<BlockLease>,
        layer: usize,
        mut staged: Staged,
        pieces: Vec<(usize, u32)>,
    ) -> Soon<()> {
        let (reply, applied) = oneshot::channel();
        let slot = staged.slot.take().expect("only dropping takes the slot");
        ask(&self.into, Request::Apply { lease, layer, slot, pieces, reply }, applied)
    }
}

/// A thread that is gone drops what it was asked.
fn ask<T: Send + 'static>(
    thread: &Sender<Request>,
    request: Request,
    reply: oneshot::Receiver<T>,
) -> Soon<T> {
    let _ = thread.send(request);
    Box::pin(async move { reply.await.map_err(|_| MemoryLost) })
}

/// A slot in use. Goes back to its ring when dropped.
pub(crate) struct Staged {
    slot: Option<Slot>,
    bytes: usize,
    home: Sender<Request>,
}

impl AsRef<[u8]> for Staged {
    fn as_ref(&self) -> &[u8] {
        let slot = self.slot.as_ref().expect("only dropping takes the slot");
        &(**slot).as_ref()[..self.bytes]
    }
}

impl AsMut<[u8]> for Staged {
    fn as_mut(&mut self) -> &mut [u8] {
        let slot = self.slot.as_mut().expect("only dropping takes the slot");
        &mut (**slot).as_mut()[..self.bytes]
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let _ = self.home.send(Request::Returned(slot));
        }
    }
}

/// One layer of blocks, and the lease that keeps them.
type Pieces = (Arc<BlockLease>, usize, Vec<u32>);

enum Request {
    /// A slot for so many bytes, filled with pieces if any are named.
    Room {
        for_read: Option<Pieces>,
        bytes: usize,
        home: Sender<Self>,
        reply: oneshot::Sender<Staged>,
    },
    Apply {
        lease: Arc<BlockLease>,
        layer: usize,
        slot: Slot,
        pieces: Vec<(usize, u32)>,
        reply: oneshot::Sender<()>,
    },
    Returned(Slot),
}

fn start(name: &str, (copies, free): Direction) -> Sender<Request> {
    let (requests, inbox) = mpsc::channel();
    let copier = Copier { copies, free, waiting: VecDeque::new(), begun: VecDeque::new() };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || copier.run(&inbox))
        .expect("the operating system has a thread for copies");
    requests
}

/// What one thread owns.
struct Copier {
    copies: Box<dyn Copies>,
    free: Vec<Slot>,
    /// Requests for a slot.
    waiting: VecDeque<Request>,
    begun: VecDeque<Begun>,
}

/// A copy that the device makes.
struct Begun {
    lease: Arc<BlockLease>,
    done: Done,
}

enum Done {
    Read(Staged, oneshot::Sender<Staged>),
    Apply(Slot, oneshot::Sender<()>),
}

impl Copier {
    /// Until nobody can ask any more, or the device has failed.
    fn run(mut self, inbox: &Receiver<Request>) {
        loop {
            let request = match self.begun.is_empty() {
                true => match inbox.recv() {
                    Ok(request) => Some(request),
                    Err(_) => return,
                },
                false => inbox.try_recv().ok(),
            };
            let went = match request {
                Some(request) => self.take(request),
                None => self.end_oldest(),
            };
            if let Err(MemoryLost) = went {
                return;
            }
        }
    }

    fn take(&mut self, request: Request) -> Result<(), MemoryLost> {
        match request {
            Request::Room { .. } => self.waiting.push_back(request),
            Request::Apply { lease, layer, slot, pieces, reply } => {
                self.apply(lease, layer, slot, &pieces, reply)?;
            }
            Request::Returned(slot) => self.free.push(slot),
        }
        while !self.free.is_empty()
            && let Some(request) = self.waiting.pop_front()
        {
            self.give_room(request)?;
        }
        Ok(())
    }

    fn give_room(&mut self, request: Request) -> Result<(), MemoryLost> {
        let Request::Room { for_read, bytes, home, reply } = request else { return Ok(()) };
        // Of a transfer that has ended meanwhile.
        if reply.is_closed() {
            return Ok(());
        }
        let slot = self.free.pop();
        let mut staged = Staged { slot, bytes, home };
        let Some((lease, layer, blocks)) = for_read else {
            let _ = reply.send(staged);
            return Ok(());
        };
        // SAFETY: the slot is touched again when the copy was waited for. The pieces are complete,
        // and the lease, which is kept until then, keeps them as they are.
        unsafe { self.copies.gather(layer, &blocks, staged.as_mut())? };
        self.begun.push_back(Begun { lease, done: Done::Read(staged, reply) });
        Ok(())
    }

    fn apply(
        &mut self,
        lease: Arc<BlockLease>,
        layer: usize,
        slot: Slot,
        pieces: &[(usize, u32)],
        reply: oneshot::Sender<()>,
    ) -> Result<(), MemoryLost> {
        let copies = &mut self.copies;
        let begun = lease.while_writable(|| {
            // SAFETY: the slot is touched again when the copy was waited for. The blocks were
            // granted to the lease alone, which is kept until then; they are the engine's only when
            // everything that was to be written is applied.
            unsafe { copies.scatter(layer, (*slot).as_ref(), pieces) }
        });
        match begun {
            Some(begun) => begun?,
            None => {
                self.free.push(slot);
                drop(lease);
                let _ = reply.send(());
                return Ok(());
            }
        }
        self.begun.push_back(Begun { lease, done: Done::Apply(slot, reply) });
        Ok(())
    }

    fn end_oldest(&mut self) -> Result<(), MemoryLost> {
        self.copies.wait()?;
        let Some(Begun { lease, done }) = self.begun.pop_front() else { return Ok(()) };
        // Before anybody hears that it is not needed any more.
        drop(lease);
        match done {
            Done::Read(staged, reply) => drop(reply.send(staged)),
            Done::Apply(slot, reply) => {
                self.take(Request::Returned(slot))?;
                let _ = reply.send(());
            }
        }
        Ok(())
    }
}
