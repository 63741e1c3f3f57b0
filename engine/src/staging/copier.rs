//! The thread of one direction.
#![expect(unsafe_code, reason = "begins copies of what it keeps from being touched meanwhile")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use tokio::sync::oneshot;

use super::{Copies, Slot, Staged};
use crate::channel::Parcel;
use crate::lease::BlockLease;
use crate::memory::{MemoryLost, PeerKv, SharedKv};

/// One layer of blocks, and the lease that keeps them.
type Pieces = (Arc<BlockLease>, usize, Vec<u32>);

pub(super) enum Request {
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
    Open {
        shared: SharedKv,
        reply: oneshot::Sender<Option<PeerKv>>,
    },
    Pull {
        peer: PeerKv,
        from: Vec<u32>,
        lease: Arc<BlockLease>,
        layer: usize,
        to: Vec<u32>,
        reply: oneshot::Sender<bool>,
    },
    Pack {
        lease: Arc<BlockLease>,
        layer: usize,
        blocks: Vec<u32>,
        parcel: Parcel,
        reply: oneshot::Sender<Parcel>,
    },
    Unpack {
        lease: Arc<BlockLease>,
        layer: usize,
        blocks: Vec<u32>,
        parcel: Parcel,
        reply: oneshot::Sender<bool>,
    },
}

/// What one thread owns.
pub(super) struct Copier {
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
    /// The peer's cache stays open until then.
    Pull(PeerKv, oneshot::Sender<bool>),
    Pack(Parcel, oneshot::Sender<Parcel>),
    Unpack(Parcel, oneshot::Sender<bool>),
}

impl Copier {
    /// Starts the thread.
    pub(super) fn start(name: &str, copies: Box<dyn Copies>, free: Vec<Slot>) -> Sender<Request> {
        let (requests, inbox) = mpsc::channel();
        let copier = Self { copies, free, waiting: VecDeque::new(), begun: VecDeque::new() };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || copier.run(&inbox))
            .expect("the operating system has a thread for copies");
        requests
    }

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
            Request::Open { shared, reply } => drop(reply.send(self.copies.open(&shared)?)),
            Request::Pull { peer, from, lease, layer, to, reply } => {
                self.pull((peer, &from), lease, (layer, &to), reply)?;
            }
            Request::Pack { lease, layer, blocks, parcel, reply } => {
                // SAFETY: as of slots: the parcel is this copy's alone.
                unsafe { self.copies.pack(layer, &blocks, parcel.parts())? };
                self.begun.push_back(Begun { lease, done: Done::Pack(parcel, reply) });
            }
            Request::Unpack { lease, layer, blocks, parcel, reply } => {
                self.unpack(lease, (layer, &blocks), parcel, reply)?;
            }
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
        let Some(mut slot) = self.free.pop() else { return Ok(()) };
        let Some((lease, layer, blocks)) = for_read else {
            let _ = reply.send(Staged { slot: Some(slot), bytes, home });
            return Ok(());
        };
        // SAFETY: the slot is touched again when the copy was waited for. The pieces are complete,
        // and the lease, which is kept until then, keeps them as they are.
        unsafe { self.copies.gather(layer, &blocks, &mut *slot)? };
        let staged = Staged { slot: Some(slot), bytes, home };
        self.begun.push_back(Begun { lease, done: Done::Read(staged, reply) });
        Ok(())
    }

    fn apply(
        &mut self,
        lease: Arc<BlockLease>,
        layer: usize,
        mut slot: Slot,
        pieces: &[(usize, u32)],
        reply: oneshot::Sender<()>,
    ) -> Result<(), MemoryLost> {
        let copies = &mut self.copies;
        let begun = lease.while_writable(|| {
            // SAFETY: the slot is touched again when the copy was waited for. The blocks were
            // granted to the lease alone, which is kept until then; they are the engine's only when
            // everything that was to be written is applied.
            unsafe { copies.scatter(layer, &mut *slot, pieces) }
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

    fn pull(
        &mut self,
        (peer, from): (PeerKv, &[u32]),
        lease: Arc<BlockLease>,
        (layer, to): (usize, &[u32]),
        reply: oneshot::Sender<bool>,
    ) -> Result<(), MemoryLost> {
        let copies = &mut self.copies;
        let exist = from.len() == to.len() && from.iter().all(|&block| block < peer.blocks);
        // SAFETY: the peer has the blocks. Those here were granted to the lease alone, as above.
        let begin = || unsafe { copies.pull(&peer, layer, from, to) };
        match exist.then(|| lease.while_writable(begin)).flatten() {
            Some(begun) if begun? => {
                self.begun.push_back(Begun { lease, done: Done::Pull(peer, reply) });
            }
            _ => {
                drop(lease);
                let _ = reply.send(false);
            }
        }
        Ok(())
    }

    fn unpack(
        &mut self,
        lease: Arc<BlockLease>,
        (layer, blocks): (usize, &[u32]),
        parcel: Parcel,
        reply: oneshot::Sender<bool>,
    ) -> Result<(), MemoryLost> {
        let copies = &mut self.copies;
        // SAFETY: the parcel is this copy's alone; the blocks were granted to the lease alone.
        let begin = || unsafe { copies.unpack(layer, parcel.parts(), blocks) };
        match lease.while_writable(begin) {
            Some(begun) => {
                begun?;
                self.begun.push_back(Begun { lease, done: Done::Unpack(parcel, reply) });
            }
            None => {
                drop((lease, parcel));
                let _ = reply.send(false);
            }
        }
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
            Done::Pull(peer, reply) => {
                drop(peer);
                let _ = reply.send(true);
            }
            Done::Pack(parcel, reply) => drop(reply.send(parcel)),
            Done::Unpack(parcel, reply) => {
                drop(parcel);
                let _ = reply.send(true);
            }
        }
        Ok(())
    }
}
