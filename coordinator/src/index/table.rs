//! A hash table from 64 uniform bits to a number: 12 bytes per entry, and 25 to 40 % more for room.
//!
//! It is many small tables in one, each of which grows by itself and by an eighth at a time, so that
//! no insertion copies more than a thousandth of all entries. Removing an entry closes the gap that
//! it leaves, so entries that come and go leave nothing behind.

use std::num::NonZeroU32;

/// How many small tables.
const SHARDS: usize = 1024;
/// A shard is at most four fifths full.
const FULL: (usize, usize) = (4, 5);
/// Most places per entry that a table is made for: with so many it holds a third more.
const PLACES: (usize, usize) = (5, 3);
/// Places that a shard may have in any case. Few entries are spread less evenly.
const MIN_PLACES: usize = 64;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<Shard>,
    entries: usize,
    /// Of all shards.
    places: usize,
    /// Of one.
    max_places: usize,
}

/// There is no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Full;

#[derive(Clone, Debug, Default)]
struct Shard {
    entries: usize,
    /// An entry is at its home, or after it with no unused place between.
    places: Box<[Place]>,
}

/// In halves, so that a place takes 12 bytes and not 16.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    key: [u32; 2],
    /// `None`: unused.
    value: Option<NonZeroU32>,
}

/// Where an entry may be. Void once something was inserted or removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Position {
    shard: usize,
    at: usize,
}

impl Table {
    /// An empty table for `max_entries`.
    pub(super) fn new(max_entries: usize) -> Self {
        let max_places = max_entries.saturating_mul(PLACES.0) / PLACES.1 / SHARDS;
        let max_places = max_places.max(MIN_PLACES);
        Self { shards: vec![Shard::default(); SHARDS], entries: 0, places: 0, max_places }
    }

    /// How many entries.
    pub(super) fn len(&self) -> usize {
        self.entries
    }

    /// Memory, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.places * size_of::<Place>() + self.shards.capacity() * size_of::<Shard>()
    }

    /// Where the entry of a key is.
    pub(super) fn find(&self, key: u64) -> Option<Position> {
        let shard = shard_of(key);
        let at = self.shards[shard].find(key)?;
        Some(Position { shard, at })
    }

    /// The value of a key.
    pub(super) fn value(&self, key: u64) -> Option<NonZeroU32> {
        self.entry(self.find(key)?).map(|(_, value)| value)
    }

    /// Has the memory read where the entry of a key begins to be looked for. Reads for several keys
    /// wait for memory together; lookups, each of which branches on what it finds, wait in turn.
    pub(super) fn touch(&self, key: u64) {
        let places = &self.shards[shard_of(key)].places;
        std::hint::black_box(places.get(home(key, places.len())).map(|place| place.value));
    }

    /// The entry at a position, if there is one.
    pub(super) fn entry(&self, position: Position) -> Option<(u64, NonZeroU32)> {
        let place = self.shards[position.shard].places.get(position.at)?;
        Some((place.key(), place.value?))
    }

    /// Changes the value of an entry.
    pub(super) fn set(&mut self, position: Position, value: NonZeroU32) {
        self.shards[position.shard].places[position.at].value = Some(value);
    }

    /// Adds an entry, whose key must have none.
    pub(super) fn insert(&mut self, key: u64, value: NonZeroU32) -> Result<(), Full> {
        let shard = &mut self.shards[shard_of(key)];
        let before = shard.places.len();
        if (shard.entries + 1) * FULL.1 > before * FULL.0 {
            if before == self.max_places {
                return Err(Full);
            }
            shard.grow((before + before / 8 + 4).min(self.max_places));
            self.places += shard.places.len() - before;
        }
        shard.insert(Place { key: halves(key), value: Some(value) });
        self.entries += 1;
        Ok(())
    }

    /// Takes an entry out. A later one may take its place.
    pub(super) fn remove(&mut self, position: Position) {
        self.shards[position.shard].remove(position.at);
        self.entries -= 1;
    }

    /// The position after this one; after the last comes the first.
    pub(super) fn after(&self, position: Position) -> Position {
        let Position { shard, at } = position;
        if at + 1 < self.shards[shard].places.len() {
            return Position { shard, at: at + 1 };
        }
        Position { shard: (shard + 1) % SHARDS, at: 0 }
    }
}

impl Shard {
    fn find(&self, key: u64) -> Option<usize> {
        if self.places.is_empty() {
            return None;
        }
        let wanted = halves(key);
        let mut at = home(key, self.places.len());
        loop {
            let place = &self.places[at];
            place.value?;
            if place.key == wanted {
                return Some(at);
            }
            at = self.next(at);
        }
    }

    fn insert(&mut self, entry: Place) {
        let mut at = home(entry.key(), self.places.len());
        while self.places[at].value.is_some() {
            at = self.next(at);
        }
        self.places[at] = entry;
        self.entries += 1;
    }

    fn remove(&mut self, at: usize) {
        let size = self.places.len();
        let distance =
            |from: usize, to: usize| if to < from { to + size - from } else { to - from };
        let (mut gap, mut at) = (at, self.next(at));
        while self.places[at].value.is_some() {
            let home = home(self.places[at].key(), size);
            // The gap is on the way from the entry's home to it.
            if distance(home, at) >= distance(gap, at) {
                self.places[gap] = self.places[at];
                gap = at;
            }
            at = self.next(at);
        }
        self.places[gap] = Place::default();
        self.entries -= 1;
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.places.len() { 0 } else { at + 1 }
    }

    fn grow(&mut self, size: usize) {
        let larger = vec![Place::default(); size].into_boxed_slice();
        let entries = std::mem::replace(&mut self.places, larger);
        self.entries = 0;
        // In the order of their homes, so this reads and writes memory from front to back.
        entries.iter().filter(|place| place.value.is_some()).for_each(|&entry| self.insert(entry));
    }
}

impl Place {
    fn key(&self) -> u64 {
        u64::from(self.key[0]) | u64::from(self.key[1]) << 32
    }
}

fn halves(key: u64) -> [u32; 2] {
    [key as u32, (key >> 32) as u32]
}

fn shard_of(key: u64) -> usize {
    key as usize % SHARDS
}

/// Scales the key's upper bits to `0..size`, which may be any number.
fn home(key: u64, size: usize) -> usize {
    ((u128::from(key) * size as u128) >> 64) as usize
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
