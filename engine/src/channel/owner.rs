//! The thread of a channel.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_kernels::cuda::{Communicator, Event, Stream, UniqueId};
use tokio::sync::oneshot;

use super::lanes::Lane;
use super::{NcclChannel, NcclChannels, Parcel, Ring, State};

/// How long to leave the processor alone before asking again whether something is done.
const POLL: Duration = Duration::from_micros(50);

/// The ranks of a lane's ends.
const RECEIVING: usize = 0;
const SENDING: usize = 1;

/// How a channel is joined.
pub(super) struct Terms {
    pub(super) lanes: Vec<Lane>,
    /// Of each lane.
    pub(super) names: Vec<UniqueId>,
    pub(super) receives: bool,
    pub(super) deadline: Instant,
    pub(super) patience: Duration,
}

pub(super) enum Request {
    Send(Parcel, oneshot::Sender<()>),
    Receive(usize, oneshot::Sender<Parcel>),
    /// There may be something new in the shared state.
    Look,
}

/// Something that the devices are at.
struct Begun {
    /// Of each lane.
    events: Vec<Event>,
    parcel: Parcel,
    done: Done,
}

enum Done {
    Sent(oneshot::Sender<()>),
    Received(oneshot::Sender<Parcel>),
}

/// Why a channel ends, in words.
type Broken = String;

/// Joins a channel, says what came of it, and works until it breaks or is closed. Its lanes count until
/// then.
pub(super) fn run(
    channels: &NcclChannels,
    terms: &Terms,
    reply: oneshot::Sender<Result<NcclChannel, String>>,
) {
    let counted = channels.count(terms.lanes.len());
    let joined = counted.as_ref().map_err(Clone::clone);
    let (mut owner, handle) = match joined.and_then(|_| Owner::join(channels, terms)) {
        Ok(joined) => joined,
        Err(reason) => {
            let _ = reply.send(Err(reason));
            if terms.receives {
                channels.release(&terms.names);
            }
            return;
        }
    };
    // Nobody waits for it: the handle ends it.
    let _ = reply.send(Ok(handle));
    while owner.turn().is_ok() {}
    owner.end();
}

/// A lane that both ends have joined.
struct JoinedLane {
    communicator: Communicator,
    stream: Stream,
}

struct Owner {
    lanes: Vec<JoinedLane>,
    peer: usize,
    ring: Arc<Ring>,
    state: Arc<State>,
    inbox: Receiver<Request>,
    waiting: VecDeque<Request>,
    begun: VecDeque<Begun>,
    idle: Vec<Vec<Event>>,
    /// When the oldest one got its turn.
    since: Instant,
}

impl Owner {
    fn join(channels: &NcclChannels, terms: &Terms) -> Result<(Self, NcclChannel), Broken> {
        // Memory first: what is joined is to work.
        let ring = Ring::new(&channels.devices, &terms.lanes).map_err(broken)?;
        let peer = if terms.receives { SENDING } else { RECEIVING };
        let join = |(lane, name): (&Lane, _)| {
            let device = channels.devices[lane.device].device();
            let stream = Stream::with_priority(device, -1).map_err(broken)?;
            let ranks = (SENDING - peer, 2);
            let communicator =
                Communicator::join(&channels.nccl, device, name, ranks, terms.deadline);
            Ok(JoinedLane { communicator: communicator.map_err(broken)?, stream })
        };
        let joined = terms.lanes.iter().zip(&terms.names).map(join);
        let lanes = joined.collect::<Result<Vec<_>, Broken>>()?;
        let state = Arc::new(State {
            patience: terms.patience,
            closed: AtomicBool::new(false),
            busy: Mutex::new(None),
            aborts: lanes.iter().map(|lane| lane.communicator.aborter()).collect(),
        });
        let (requests, inbox) = mpsc::channel();
        let handle = NcclChannel { requests, ring: ring.clone(), state: state.clone() };
        let (waiting, begun, idle) = (VecDeque::new(), VecDeque::new(), Vec::new());
        let since = Instant::now();
        let owner = Self { lanes, peer, ring, state, inbox, waiting, begun, idle, since };
        Ok((owner, handle))
    }

    /// Does what can be done now. An error: the channel is to end.
    fn turn(&mut self) -> Result<(), Broken> {
        if self.waiting.is_empty() && self.begun.is_empty() {
            *self.state.busy() = None;
            let request = self.inbox.recv().map_err(broken)?;
            self.waiting.push_back(request);
        }
        *self.state.busy() = Some(Instant::now());
        self.waiting.extend(self.inbox.try_iter());
        if self.state.closed.load(Ordering::Relaxed) {
            return Err("it was closed".to_owned());
        }
        self.begin()?;
        match self.begun.front() {
            Some(oldest) if oldest.is_done()? => self.end_oldest(),
            Some(_) => {
                let mut lanes = self.lanes.iter();
                lanes.try_for_each(|lane| lane.communicator.check()).map_err(broken)?;
                if self.since.elapsed() > self.state.patience {
                    return Err("it takes too long".to_owned());
                }
                std::thread::sleep(POLL);
            }
            None if !self.waiting.is_empty() => std::thread::sleep(POLL),
            None => {}
        }
        Ok(())
    }

    /// Queues what waits, in order, as far as there are parcels.
    fn begin(&mut self) -> Result<(), Broken> {
        while let Some(request) = self.waiting.pop_front() {
            let (parcel, done) = match request {
                Request::Look => continue,
                Request::Send(parcel, reply) => (parcel, Done::Sent(reply)),
                Request::Receive(bytes, _) if !self.ring.fits(bytes) => {
                    return Err(format!("no parcel has {bytes} bytes"));
                }
                Request::Receive(bytes, reply) => {
                    let Some(parcel) = Ring::take(&self.ring, bytes) else {
                        self.waiting.push_front(Request::Receive(bytes, reply));
                        return Ok(());
                    };
                    (parcel, Done::Received(reply))
                }
            };
            let queued = self.queue(&parcel, matches!(done, Done::Sent(_)));
            if self.begun.is_empty() {
                self.since = Instant::now();
            }
            // If not all lanes have it, some may be at it: it is kept until the end.
            let (events, result) = queued.map_or_else(|e| (Vec::new(), Err(e)), |e| (e, Ok(())));
            self.begun.push_back(Begun { events, parcel, done });
            result?;
        }
        Ok(())
    }

    /// Queues the parts of a parcel, each on its lane; gives what says that they have gone through.
    fn queue(&mut self, parcel: &Parcel, sends: bool) -> Result<Vec<Event>, Broken> {
        for (lane, pieces) in self.lanes.iter().zip(parcel.contents()) {
            let JoinedLane { communicator, stream } = lane;
            // Each call may take its time, which is not to look as if one were stuck.
            *self.state.busy() = Some(Instant::now());
            match sends {
                true => communicator.send(stream, pieces, self.peer).map_err(broken)?,
                false => communicator.receive(stream, pieces, self.peer).map_err(broken)?,
            }
        }
        let new = || self.lanes.iter().map(|lane| Event::new(lane.stream.device())).collect();
        let events: Vec<_> = self.idle.pop().map_or_else(new, Ok).map_err(broken)?;
        for (event, lane) in events.iter().zip(&self.lanes) {
            event.record(&lane.stream).map_err(broken)?;
        }
        Ok(events)
    }

    fn end_oldest(&mut self) {
        let Some(Begun { events, parcel, done }) = self.begun.pop_front() else { return };
        self.idle.push(events);
        self.since = Instant::now();
        match done {
            Done::Sent(reply) => {
                drop(parcel);
                let _ = reply.send(());
            }
            // In vain: the parcel is free again.
            Done::Received(reply) => drop(reply.send(parcel)),
        }
    }

    /// Whoever waits hears of it first. Memory is freed when the library has let it go; if it never
    /// does, this thread is the one that waits, and the channel still counts.
    fn end(mut self) {
        self.state.close();
        // Dropping what they are answered by tells them.
        let parcels: Vec<_> = self.begun.drain(..).map(|begun| begun.parcel).collect();
        self.waiting.clear();
        drop(self.inbox);
        // An abort frees memory, which waits for the device, and so for the work of a lane beside it on
        // that device, which only its own abort ends.
        std::thread::scope(|scope| {
            for abort in &self.state.aborts {
                scope.spawn(|| abort.abort());
            }
        });
        for lane in &self.lanes {
            let _ = lane.stream.synchronize();
        }
        drop(parcels);
    }
}

impl Begun {
    /// Whether all lanes are done with it.
    fn is_done(&self) -> Result<bool, Broken> {
        for event in &self.events {
            if !event.is_done().map_err(broken)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn broken(error: impl std::fmt::Display) -> Broken {
    error.to_string()
}
