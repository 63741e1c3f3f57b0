use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BLOCKS: usize = 9;

/// What precedes a block and the block itself, one letter per block: stands for its hash.
type Path = Vec<u8>;

fn hash(path: &[u8]) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..path.len()].copy_from_slice(path);
    bytes[15] = path.len() as u8;
    BlockHash(bytes)
}

fn chain(path: &[u8]) -> Vec<BlockHash> {
    (1..=path.len()).map(|length| hash(&path[..length])).collect()
}

#[derive(Clone, Debug)]
enum Op {
    /// A sequence of these blocks comes and takes what is cached.
    Start(Path, bool),
    /// Its next block is full.
    Fill(usize),
    /// It ends.
    End(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let start = (prop::collection::vec(1..3_u8, 1..5), any::<bool>());
    let op = prop_oneof![
        2 => start.prop_map(|(path, transfer)| Op::Start(path, transfer)),
        4 => any::<usize>().prop_map(Op::Fill),
        1 => any::<usize>().prop_map(Op::End),
    ];
    prop::collection::vec(op, 1..80)
}

struct Sequence {
    path: Path,
    user: User,
    blocks: Vec<u32>,
    filled: usize,
}

/// Knows paths and counts, no blocks, lists or indices: everything is searched for.
#[derive(Default)]
struct Naive {
    /// Cached paths with their users and when they were last given back.
    cached: BTreeMap<Path, (Vec<User>, u64)>,
    /// Users of blocks that are not cached.
    private: Vec<User>,
    clock: u64,
}

impl Naive {
    fn free(&self) -> usize {
        BLOCKS - self.cached.len() - self.private.len()
    }

    fn unused(&self) -> usize {
        self.cached.values().filter(|(users, _)| users.is_empty()).count()
    }

    fn evict(&mut self) {
        let leaf = |path: &Path| {
            let continues =
                |other: &&Path| other.len() == path.len() + 1 && other.starts_with(path);
            !self.cached.keys().any(|other| continues(&other))
        };
        let unused = self.cached.iter().filter(|(path, (users, _))| users.is_empty() && leaf(path));
        let oldest = unused.min_by_key(|(_, (_, last_used))| *last_used);
        let path = oldest.expect("room was counted").0.clone();
        self.cached.remove(&path);
    }

    fn start(&mut self, path: &[u8], user: User) -> usize {
        let matched = (1..=path.len()).take_while(|n| self.cached.contains_key(&path[..*n]));
        let matched = matched.count();
        for length in 1..=matched {
            self.cached.get_mut(&path[..length]).unwrap().0.push(user);
        }
        for _ in matched..path.len() {
            if self.free() == 0 {
                self.evict();
            }
            self.private.push(user);
        }
        matched
    }

    fn forget_private(&mut self, user: User) {
        let place = self.private.iter().position(|other| *other == user).unwrap();
        self.private.swap_remove(place);
    }

    fn fill(&mut self, path: &[u8], user: User) {
        self.forget_private(user);
        self.cached.entry(path.to_vec()).or_default().0.push(user);
    }

    fn end(&mut self, sequence: &Sequence) {
        for length in (1..=sequence.path.len()).rev() {
            if length > sequence.filled {
                self.forget_private(sequence.user);
                continue;
            }
            let (users, last_used) = self.cached.get_mut(&sequence.path[..length]).unwrap();
            let place = users.iter().position(|user| *user == sequence.user).unwrap();
            users.swap_remove(place);
            if users.is_empty() {
                self.clock += 1;
                *last_used = self.clock;
            }
        }
    }

    fn counts(&self) -> BlockCounts {
        let of = |users: &[User]| match users {
            [] => 'c',
            users if users.contains(&User::Sequence) => 'a',
            _ => 'l',
        };
        let private = self.private.iter().map(|user| of(&[*user]));
        let cached = self.cached.values().map(|(users, _)| of(users));
        let states: Vec<char> = private.chain(cached).collect();
        let count = |state| states.iter().filter(|other| **other == state).count() as u64;
        let (active, leased, cached) = (count('a'), count('l'), count('c'));
        BlockCounts { free: self.free() as u64, active, cached, leased }
    }
}

fn start(cache: &mut PrefixCache, naive: &mut Naive, path: Path, user: User) -> Option<Sequence> {
    let hashes = chain(&path);
    let found = cache.find(&hashes);
    let needed = path.len() - found.blocks;
    let room = naive.free() + naive.unused();
    assert_eq!(cache.available(), room);
    if needed > room - found.unused {
        return None;
    }
    let mut blocks = Vec::new();
    cache.share(&hashes[..found.blocks], user, &mut blocks);
    cache.allocate(needed, user, &mut blocks).unwrap();
    assert_eq!(naive.start(&path, user), found.blocks);
    Some(Sequence { path, user, blocks, filled: found.blocks })
}

fn fill(cache: &mut PrefixCache, naive: &mut Naive, sequence: &mut Sequence) {
    let Sequence { path, user, blocks, filled } = sequence;
    if *filled == path.len() {
        return;
    }
    let (hashes, own) = (chain(path), blocks[*filled]);
    let parent = filled.checked_sub(1).map(|before| hashes[before]);
    let cached = cache.insert(parent, hashes[*filled], own);
    if cached != own {
        cache.retain(cached, *user);
        cache.release(own, *user);
        blocks[*filled] = cached;
    }
    *filled += 1;
    naive.fill(&path[..*filled], *user);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn behaves_as_a_naive_model(ops in ops()) {
        let (mut cache, mut naive) = (PrefixCache::new(BLOCKS), Naive::default());
        let mut sequences: Vec<Sequence> = Vec::new();
        let mut told = BTreeSet::new();
        for op in ops {
            match op {
                Op::Start(path, transfer) => {
                    let user = if transfer { User::Transfer } else { User::Sequence };
                    sequences.extend(start(&mut cache, &mut naive, path, user));
                }
                Op::Fill(i) if !sequences.is_empty() => {
                    let i = i % sequences.len();
                    fill(&mut cache, &mut naive, &mut sequences[i]);
                }
                Op::End(i) if !sequences.is_empty() => {
                    let sequence = sequences.swap_remove(i % sequences.len());
                    for &block in sequence.blocks.iter().rev() {
                        cache.release(block, sequence.user);
                    }
                    naive.end(&sequence);
                }
                _ => {}
            }
            cache.check();
            prop_assert_eq!(cache.counts(), naive.counts());
            let cached: BTreeSet<_> = naive.cached.keys().map(|path| hash(path)).collect();
            prop_assert_eq!(cache.snapshot(), cached.iter().copied().collect::<Vec<_>>());
            let (stored, removed) = cache.take_changes();
            prop_assert!(stored.iter().all(|hash| told.insert(*hash)), "stored once");
            prop_assert!(removed.iter().all(|hash| told.remove(hash)), "removed what was told");
            prop_assert_eq!(&told, &cached, "changes add up to the snapshot");
        }
    }
}

#[test]
fn a_full_pool_says_what_is_missing() {
    let mut cache = PrefixCache::new(3);
    let mut blocks = Vec::new();
    cache.allocate(2, User::Sequence, &mut blocks).unwrap();
    let error = cache.allocate(2, User::Transfer, &mut blocks).unwrap_err();
    assert_eq!(error, Exhausted { needed: 2, free: 1 });
    assert_eq!(blocks.len(), 2, "nothing is taken by a refused allocation");
}

#[test]
fn a_change_and_its_opposite_are_no_change() {
    let mut cache = PrefixCache::new(1);
    for path in [[1], [2], [1]] {
        let mut blocks = Vec::new();
        cache.allocate(1, User::Sequence, &mut blocks).unwrap();
        cache.insert(None, hash(&path), blocks[0]);
        cache.release(blocks[0], User::Sequence);
    }
    assert_eq!(cache.take_changes(), (vec![hash(&[1])], vec![]));
}
