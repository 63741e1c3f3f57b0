//! [`Guides`]: threads that compile grammars and compute masks, so that the engine's thread does
//! neither. Their results come back through the inbox.
//!
//! A task carries the sequence's guide to a thread and its result carries it back, so every mask
//! is of the tokens that its task was asked with, and nothing has to be cleaned up when a sequence
//! ends meanwhile. Grammars are compiled by a thread of their own: a large one holds up nobody's
//! masks.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_grammar::{Ends, GrammarError, Grammars, Guide, TokenMask};

use crate::inbox::Inbox;
use crate::scheduler::{MaskFound, MaskWanted};

/// Most threads that compute masks.
const MAX_THREADS: usize = 8;
/// Cores of the machine for each of them.
const CORES_PER_THREAD: usize = 4;

/// A sequence whose mask takes longer fails: others wait for theirs meanwhile. Most masks take
/// microseconds.
const MASK_TIMEOUT: Duration = Duration::from_secs(5);

/// The threads. They end when it is dropped.
pub(crate) struct Guides {
    to_compile: Sender<MaskWanted>,
    to_mask: Sender<MaskWanted>,
    grammars: Arc<Grammars>,
}

impl Guides {
    /// Starts the threads.
    ///
    /// # Panics
    /// If the operating system has no thread.
    pub(crate) fn start(grammars: &Arc<Grammars>, inbox: &Arc<Inbox>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / CORES_PER_THREAD).clamp(1, MAX_THREADS);
        Self {
            to_compile: spawn("grammar", 1, grammars, inbox),
            to_mask: spawn("mask", threads, grammars, inbox),
            grammars: grammars.clone(),
        }
    }

    /// Asks for a mask.
    pub(crate) fn ask(&self, wanted: MaskWanted) {
        let compiled = wanted.guide.is_some() || self.grammars.keeps(&wanted.grammar);
        let queue = if compiled { &self.to_mask } else { &self.to_compile };
        queue.send(wanted).expect("the threads live as long as their queue");
    }
}

/// Starts threads that take from one queue.
fn spawn(
    name: &str,
    threads: usize,
    grammars: &Arc<Grammars>,
    inbox: &Arc<Inbox>,
) -> Sender<MaskWanted> {
    let (queue, tasks) = channel();
    let tasks = Arc::new(Mutex::new(tasks));
    for _ in 0..threads {
        let (tasks, grammars, inbox) = (tasks.clone(), grammars.clone(), inbox.clone());
        let work = move || {
            while let Some(wanted) = next(&tasks) {
                let found = MaskFound { number: wanted.number, outcome: find(&grammars, wanted) };
                inbox.masked(found);
            }
        };
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        spawned.expect("the operating system has a thread for grammars");
    }
    queue
}

/// None once nobody can ask any more.
fn next(tasks: &Mutex<Receiver<MaskWanted>>) -> Option<MaskWanted> {
    tasks.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn find(grammars: &Grammars, wanted: MaskWanted) -> Result<(Guide, TokenMask), GrammarError> {
    let MaskWanted { grammar, guide, tokens, eos, stop, early, .. } = wanted;
    let follow = || {
        let mut guide = guide.map_or_else(|| grammars.guide(&grammar), Ok)?;
        let began = Instant::now();
        guide.accept(&tokens)?;
        let mask = guide.mask(Ends { eos: &eos, stop: &stop, early })?;
        if began.elapsed() > MASK_TIMEOUT {
            let what = format!("a mask of it takes more than {MASK_TIMEOUT:?}");
            return Err(GrammarError::Unusable(what));
        }
        Ok((guide, mask))
    };
    let found = follow();
    if matches!(found, Err(GrammarError::Lost(_))) {
        // Perhaps because of what all sequences of this grammar share of it.
        grammars.forget(&grammar);
    }
    found
}
