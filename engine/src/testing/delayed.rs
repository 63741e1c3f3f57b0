//! A device's memory for tests: the blocks of a [`KvStore`] behind copies that end when the test
//! says so, and not a byte earlier.

#![expect(unsafe_code, reason = "copies as a device does")]

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use baton_kernels::cpu::KvStore;
use baton_proto::geometry::KvGeometry;

use crate::executor::{AfterLayer, DeviceFailure, Executor, Step};
use crate::memory::{KvMemory, MemoryLost, PeerKv, SharedKv};
use crate::scheduler::Outcome;
use crate::staging::{Copies, PageLocked, Slot, Staging};

/// How long a test waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is in a slot before a copy out of the device has ended.
pub const NOT_YET: u8 = 0xdd;

/// Says how many copies of one direction may end.
#[derive(Default)]
pub struct Clock {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    allowed: usize,
    begun: usize,
    failed: bool,
    unreadable: bool,
}

impl Clock {
    /// Lets so many more copies end.
    pub fn allow(&self, copies: usize) {
        let mut state = self.state();
        state.allowed = state.allowed.saturating_add(copies);
        self.changed.notify_all();
    }

    /// The device fails.
    pub fn fail(&self) {
        self.state().failed = true;
        self.changed.notify_all();
    }

    /// From now on no peer can be read.
    pub fn blind(&self) {
        self.state().unreadable = true;
    }

    /// Waits until so many copies have begun.
    ///
    /// # Panics
    /// If that takes half a minute.
    pub fn wait_begun(&self, copies: usize) {
        let few = |state: &mut State| state.begun < copies;
        let waited = self.changed.wait_timeout_while(self.state(), PATIENCE, few);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        assert!(state.begun >= copies, "{} copies have begun, not {copies}", state.begun);
    }

    /// Copies that have begun.
    pub fn begun(&self) -> usize {
        self.state().begun
    }

    fn begin(&self) {
        self.state().begun += 1;
        self.changed.notify_all();
    }

    fn end(&self) -> Result<(), MemoryLost> {
        let waits = |state: &mut State| state.allowed == 0 && !state.failed;
        let state = self.changed.wait_while(self.state(), waits);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.failed {
            return Err(MemoryLost);
        }
        state.allowed -= 1;
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clocks of the copies out of the device and into it.
#[derive(Clone, Default)]
pub struct Clocks {
    /// Out of the device.
    pub out: Arc<Clock>,
    /// Into it.
    pub into: Arc<Clock>,
}

impl Clocks {
    /// Lets everything end at once.
    pub fn run(&self) {
        self.out.allow(usize::MAX);
        self.into.allow(usize::MAX);
    }

    /// An executor whose KV cache is behind `slots` slots of `slot_bytes` in each direction.
    #[must_use]
    pub fn before(
        &self,
        executor: Box<dyn Executor>,
        (slots, slot_bytes): (usize, usize),
    ) -> Box<dyn Executor> {
        Box::new(Behind { executor, clocks: self.clone(), slots, slot_bytes })
    }

    fn memory(&self, store: &Arc<KvStore>, slots: usize, slot_bytes: usize) -> KvMemory {
        let direction = |clock: &Arc<Clock>| {
            let slot = |_| Box::new(vec![0u8; slot_bytes]) as Slot;
            let (store, clock) = (store.clone(), clock.clone());
            let copies = Delayed { store, clock, begun: VecDeque::new() };
            (Box::new(copies) as Box<dyn Copies>, (0..slots).map(slot).collect())
        };
        let piece_bytes = store.layout().piece_bytes();
        let description = Arc::as_ptr(store).addr().to_le_bytes().to_vec();
        shared_stores().insert(description.clone(), Arc::downgrade(store));
        let shared = SharedKv { blocks: store.blocks() as u32, description };
        let (out, into) = (direction(&self.out), direction(&self.into));
        KvMemory::Device(Staging::start(piece_bytes, Some(shared), out, into))
    }
}

/// What can be opened in this process, as if it were another one's.
fn shared_stores() -> MutexGuard<'static, HashMap<Vec<u8>, Weak<KvStore>>> {
    static STORES: OnceLock<Mutex<HashMap<Vec<u8>, Weak<KvStore>>>> = OnceLock::new();
    STORES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// An executor whose memory is not at hand.
struct Behind {
    executor: Box<dyn Executor>,
    clocks: Clocks,
    slots: usize,
    slot_bytes: usize,
}

impl Executor for Behind {
    fn revision(&self) -> [u8; 32] {
        self.executor.revision()
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        self.executor.geometry(block_tokens)
    }

    fn vocab_size(&self) -> usize {
        self.executor.vocab_size()
    }

    fn hidden_size(&self) -> usize {
        self.executor.hidden_size()
    }

    fn max_model_len(&self) -> usize {
        self.executor.max_model_len()
    }

    fn depth(&self) -> usize {
        self.executor.depth()
    }

    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory {
        match self.executor.allocate(block_tokens, blocks) {
            KvMemory::Host(store) => self.clocks.memory(&store, self.slots, self.slot_bytes),
            KvMemory::Device(_) => panic!("an executor in host memory"),
        }
    }

    unsafe fn launch(
        &mut self,
        step: &Step<'_>,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<(), DeviceFailure> {
        // SAFETY: the caller's promise.
        unsafe { self.executor.launch(step, after_layer) }
    }

    fn finish(
        &mut self,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<Option<Outcome>, DeviceFailure> {
        self.executor.finish(after_layer)
    }
}

struct Delayed {
    store: Arc<KvStore>,
    clock: Arc<Clock>,
    begun: VecDeque<Begun>,
}

enum Begun {
    Gather { layer: usize, blocks: Vec<u32>, to: *mut u8 },
    Scatter { layer: usize, from: *const u8, pieces: Vec<(usize, u32)> },
    Pull { peer: PeerKv, layer: usize, from: Vec<u32>, to: Vec<u32> },
}

// SAFETY: the pointers are to slots, which anybody may write who is allowed to.
unsafe impl Send for Delayed {}

impl Copies for Delayed {
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut dyn PageLocked,
    ) -> Result<(), MemoryLost> {
        let bytes = blocks.len() * self.store.layout().piece_bytes();
        let to = &mut to.as_mut()[..bytes];
        to.fill(NOT_YET);
        let (blocks, to) = (blocks.to_vec(), to.as_mut_ptr());
        self.begun.push_back(Begun::Gather { layer, blocks, to });
        self.clock.begin();
        Ok(())
    }

    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &mut dyn PageLocked,
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost> {
        let (from, pieces) = (from.as_mut().as_ptr(), pieces.to_vec());
        self.begun.push_back(Begun::Scatter { layer, from, pieces });
        self.clock.begin();
        Ok(())
    }

    fn open(&mut self, shared: &SharedKv) -> Result<Option<PeerKv>, MemoryLost> {
        let store = shared_stores().get(&shared.description).and_then(Weak::upgrade);
        Ok(store.map(|cache| PeerKv { blocks: shared.blocks, cache }))
    }

    unsafe fn pull(
        &mut self,
        peer: &PeerKv,
        layer: usize,
        from: &[u32],
        to: &[u32],
    ) -> Result<bool, MemoryLost> {
        if self.clock.state().unreadable {
            return Ok(false);
        }
        let (from, to) = (from.to_vec(), to.to_vec());
        self.begun.push_back(Begun::Pull { peer: peer.clone(), layer, from, to });
        self.clock.begin();
        Ok(true)
    }

    fn wait(&mut self) -> Result<(), MemoryLost> {
        self.clock.end()?;
        let bytes = self.store.layout().piece_bytes();
        match self.begun.pop_front().expect("a copy has begun") {
            Begun::Gather { layer, blocks, to } => {
                for (at, &block) in blocks.iter().enumerate() {
                    // SAFETY: the slot has room for as many pieces and is the copy's until it was
                    // waited for; so are the pieces.
                    unsafe {
                        let piece = self.store.piece(layer, block);
                        to.add(at * bytes).copy_from_nonoverlapping(piece.as_ptr(), bytes);
                    }
                }
            }
            Begun::Pull { peer, layer, from, to } => {
                let theirs = peer.cache.downcast::<KvStore>().expect("opened as one");
                for (from, to) in from.into_iter().zip(to) {
                    // SAFETY: as below; and the test lets nobody write there meanwhile.
                    unsafe {
                        let piece = self.store.piece_mut(layer, to);
                        piece.copy_from_slice(theirs.piece(layer, from));
                    }
                }
            }
            Begun::Scatter { layer, from, pieces } => {
                for (at, block) in pieces {
                    // SAFETY: as above.
                    unsafe {
                        let piece = self.store.piece_mut(layer, block).as_mut_ptr();
                        piece.copy_from_nonoverlapping(from.add(at * bytes), bytes);
                    }
                }
            }
        }
        Ok(())
    }
}
