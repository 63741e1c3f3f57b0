//! The thread of a channel.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use baton_kernels::cuda::{Communicator, Event, Stream};
use tokio::sync::oneshot;

use super::{ChannelName, NcclChannel, NcclChannels, Parcel, Ring, State};

/// How long to leave the processor alone before asking again whether something is done.
const POLL: Duration = Duration::from_micros(50);

/// The rank of the end that receives.
const RECEIVING: usize = 0;

/// How a channel is joined.
pub(super) struct Terms {
    pub(super) name: ChannelName,
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

/// Something that the device is at.
struct Begun {
    event: Event,
    parcel: Parcel,
    done: Done,
}

enum Done {
    Sent(oneshot::Sender<()>),
    Received(oneshot::Sender<Parcel>),
}

/// Why a channel ends, in words.
type Broken = String;

/// Joins a channel, says what came of it, and works until it breaks or is closed.
pub(super) fn run(
    channels: &NcclChannels,
    terms: &Terms,
    reply: oneshot::Sender<Result<NcclChannel, String>>,
) {
    let (mut owner, handle) = match Owner::join(channels, terms) {
        Ok(joined) => joined,
        Err(reason) => return drop(reply.send(Err(reason))),
    };
    // Nobody waits for it: the handle ends it.
    let _ = reply.send(Ok(handle));
    while owner.turn().is_ok() {}
    owner.end();
}

struct Owner {
    communicator: Communicator,
    stream: Stream,
    peer: usize,
    ring: Arc<Ring>,
    state: Arc<State>,
    inbox: Receiver<Request>,
    waiting: VecDeque<Request>,
    begun: VecDeque<Begun>,
    idle: Vec<Event>,
    /// When the oldest one got its turn.
    since: Instant,
}

impl Owner {
    fn join(channels: &NcclChannels, terms: &Terms) -> Result<(Self, NcclChannel), Broken> {
        let NcclChannels { nccl, kv, .. } = channels;
        let device = kv.pieces.device();
        let (own, peer) = if terms.receives { (RECEIVING, 1) } else { (1, RECEIVING) };
        // Memory first: what is joined is to work.
        let ring = Ring::new(device, kv.share.piece_bytes()).map_err(broken)?;
        let stream = Stream::with_priority(device, -1).map_err(broken)?;
        let communicator = Communicator::join(nccl, device, &terms.name, (own, 2), terms.deadline);
        let communicator = communicator.map_err(broken)?;
        let state = Arc::new(State {
            patience: terms.patience,
            closed: AtomicBool::new(false),
            busy: Mutex::new(None),
            abort: OnceLock::from(communicator.aborter()),
        });
        let (requests, inbox) = mpsc::channel();
        let handle = NcclChannel { requests, ring: ring.clone(), state: state.clone() };
        let (waiting, begun, idle) = (VecDeque::new(), VecDeque::new(), Vec::new());
        let since = Instant::now();
        let owner =
            Self { communicator, stream, peer, ring, state, inbox, waiting, begun, idle, since };
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
            Some(oldest) if oldest.event.is_done().map_err(broken)? => self.end_oldest(),
            Some(_) => {
                self.communicator.check().map_err(broken)?;
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
                Request::Send(parcel, reply) => {
                    let pieces = parcel.memory().slice(0..parcel.bytes());
                    self.communicator.send(&self.stream, pieces, self.peer).map_err(broken)?;
                    (parcel, Done::Sent(reply))
                }
                Request::Receive(bytes, _) if bytes > self.ring.parcel_bytes => {
                    return Err(format!("{bytes} bytes are more than a parcel has"));
                }
                Request::Receive(bytes, reply) => {
                    let Some(parcel) = Ring::take(&self.ring, bytes) else {
                        self.waiting.push_front(Request::Receive(bytes, reply));
                        return Ok(());
                    };
                    let pieces = parcel.memory().slice(0..bytes);
                    self.communicator.receive(&self.stream, pieces, self.peer).map_err(broken)?;
                    (parcel, Done::Received(reply))
                }
            };
            let event = match self.idle.pop() {
                Some(event) => event,
                None => Event::new(self.stream.device()).map_err(broken)?,
            };
            event.record(&self.stream).map_err(broken)?;
            if self.begun.is_empty() {
                self.since = Instant::now();
            }
            self.begun.push_back(Begun { event, parcel, done });
        }
        Ok(())
    }

    fn end_oldest(&mut self) {
        let Some(Begun { event, parcel, done }) = self.begun.pop_front() else { return };
        self.idle.push(event);
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
        self.communicator.aborter().abort();
        let _ = self.stream.synchronize();
        drop(parcels);
    }
}

fn broken(error: impl std::fmt::Display) -> Broken {
    error.to_string()
}
