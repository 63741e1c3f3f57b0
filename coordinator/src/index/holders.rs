//! Who holds a block: one slot, or a set of slots that is stored once for all blocks which have
//! the same holders, as the blocks of one prompt mostly do. So a block takes 32 bits for its
//! holders, and "the same holders as the block before" is a comparison of numbers.

use std::num::NonZeroU32;

use super::table::{Full, Table};

/// A slot's number is below this, and a set's.
const NUMBERS: u32 = 1 << 30;
const IS_SET: u32 = 1 << 30;
const MARKED: u32 = 1 << 31;

/// The holders of a block; at least one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holders {
    /// A slot.
    One(u32),
    /// A set of two or more, by its number.
    Many(u32),
}

impl Holders {
    /// As one number, with a mark that is the table's owner's.
    pub(super) fn pack(self, marked: bool) -> NonZeroU32 {
        let number = match self {
            Self::One(slot) => slot + 1,
            Self::Many(set) => IS_SET | set,
        };
        let number = number | if marked { MARKED } else { 0 };
        NonZeroU32::new(number).expect("a slot counts from one, a set has its bit")
    }

    /// What was packed.
    pub(super) fn unpack(packed: NonZeroU32) -> (Self, bool) {
        let (number, marked) = (packed.get() & !MARKED, packed.get() & MARKED != 0);
        let set = number & IS_SET != 0;
        (if set { Self::Many(number & !IS_SET) } else { Self::One(number - 1) }, marked)
    }
}

/// Up to 64 slots, numbered from `64 * at`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Chunk {
    pub(super) at: u32,
    /// Not 0.
    pub(super) bits: u64,
}

impl Chunk {
    fn of(slot: u32) -> Self {
        Self { at: slot / 64, bits: 1 << (slot % 64) }
    }

    /// Calls `visit` with every slot, ascending.
    pub(super) fn each(self, mut visit: impl FnMut(u32)) {
        let mut bits = self.bits;
        while bits != 0 {
            visit(64 * self.at + bits.trailing_zeros());
            bits &= bits - 1;
        }
    }
}

/// All sets of two and more slots that some block has.
#[derive(Debug)]
pub(super) struct Sets {
    sets: Vec<Set>,
    unused: Vec<u32>,
    /// By a hash of the members.
    by_hash: Table,
    /// Of all sets' members.
    member_bytes: usize,
    max_bytes: usize,
    /// The members of a set while it is changed.
    scratch: Vec<Chunk>,
}

#[derive(Debug, Default)]
struct Set {
    /// Ascending.
    members: Box<[Chunk]>,
    /// Key in [`Sets::by_hash`].
    key: u64,
    /// Blocks that have it.
    blocks: u32,
}

impl Sets {
    /// No sets, and room for `max_bytes` of them.
    pub(super) fn new(max_bytes: usize) -> Self {
        let (sets, unused, scratch) = (Vec::new(), Vec::new(), Vec::new());
        let by_hash = Table::new(max_bytes / bytes_of(1));
        Self { sets, unused, by_hash, member_bytes: 0, max_bytes, scratch }
    }

    /// How many sets.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Memory, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.member_bytes
            + self.sets.capacity() * size_of::<Set>()
            + self.unused.capacity() * size_of::<u32>()
            + self.by_hash.bytes()
    }

    /// The members, in chunks, ascending.
    pub(super) fn each(&self, holders: Holders, mut visit: impl FnMut(Chunk)) {
        match holders {
            Holders::One(slot) => visit(Chunk::of(slot)),
            Holders::Many(set) => {
                self.sets[set as usize].members.iter().for_each(|&chunk| visit(chunk));
            }
        }
    }

    /// Whether a slot is among the holders.
    pub(super) fn contains(&self, holders: Holders, slot: u32) -> bool {
        let Chunk { at, bits } = Chunk::of(slot);
        let mut found = false;
        self.each(holders, |chunk| found |= chunk.at == at && chunk.bits & bits != 0);
        found
    }

    /// The holders with one more, for a block that must have these: its old ones are released then.
    pub(super) fn with(&mut self, holders: Holders, slot: u32) -> Result<Holders, Full> {
        let new = Chunk::of(slot);
        let changed = self.change(holders, |members| {
            match members.binary_search_by_key(&new.at, |chunk| chunk.at) {
                Ok(at) => members[at].bits |= new.bits,
                Err(at) => members.insert(at, new),
            }
        })?;
        Ok(changed.expect("a slot was added"))
    }

    /// The holders that `keep` has among the slots of a chunk, likewise; `None` if that is nobody.
    pub(super) fn retained(
        &mut self,
        holders: Holders,
        keep: impl Fn(u32) -> u64,
    ) -> Result<Option<Holders>, Full> {
        self.change(holders, |members| {
            members.iter_mut().for_each(|chunk| chunk.bits &= keep(chunk.at));
            members.retain(|chunk| chunk.bits != 0);
        })
    }

    /// A block has these holders no more.
    pub(super) fn release(&mut self, holders: Holders) {
        let Holders::Many(number) = holders else { return };
        let set = &mut self.sets[number as usize];
        set.blocks -= 1;
        if set.blocks == 0 {
            let Set { members, key, .. } = std::mem::take(set);
            self.member_bytes -= bytes_of(members.len());
            if let Some(at) = self.by_hash.find(key) {
                self.by_hash.remove(at);
            }
            self.unused.push(number);
        }
    }

    fn change(
        &mut self,
        holders: Holders,
        edit: impl FnOnce(&mut Vec<Chunk>),
    ) -> Result<Option<Holders>, Full> {
        let mut members = std::mem::take(&mut self.scratch);
        members.clear();
        self.each(holders, |chunk| members.push(chunk));
        edit(&mut members);
        let changed = self.acquire(&members);
        self.scratch = members;
        changed
    }

    /// A block has these holders from now on.
    fn acquire(&mut self, members: &[Chunk]) -> Result<Option<Holders>, Full> {
        match *members {
            [] => return Ok(None),
            [Chunk { at, bits }] if bits.count_ones() == 1 => {
                return Ok(Some(Holders::One(64 * at + bits.trailing_zeros())));
            }
            _ => {}
        }
        let mut key = hash(members);
        while let Some(found) = self.by_hash.value(key) {
            let number = found.get() - 1;
            let set = &mut self.sets[number as usize];
            if *set.members == *members {
                set.blocks += 1;
                return Ok(Some(Holders::Many(number)));
            }
            // Sets whose hashes are equal have keys in a row. If one in the middle goes, the same set
            // may be stored twice, which costs no more than its memory.
            key = key.wrapping_add(1);
        }
        self.store(members, key).map(Some)
    }

    fn store(&mut self, members: &[Chunk], key: u64) -> Result<Holders, Full> {
        let bytes = bytes_of(members.len());
        if self.member_bytes + bytes > self.max_bytes || self.sets.len() >= NUMBERS as usize {
            return Err(Full);
        }
        let number = self.unused.last().copied().unwrap_or(self.sets.len() as u32);
        let value = NonZeroU32::new(number + 1).expect("one more than a number");
        self.by_hash.insert(key, value)?;
        self.member_bytes += bytes;
        let set = Set { members: members.into(), key, blocks: 1 };
        match self.unused.pop() {
            Some(number) => self.sets[number as usize] = set,
            None => self.sets.push(set),
        }
        Ok(Holders::Many(number))
    }
}

/// Memory of a set with so many chunks, that of its record and of its places in tables included.
fn bytes_of(chunks: usize) -> usize {
    const RECORD: usize = size_of::<Set>() + 2 * size_of::<u64>() + size_of::<u32>();
    const ALLOCATION: usize = 16;
    RECORD + ALLOCATION + chunks * size_of::<Chunk>()
}

/// Uniform in all bits; David Stafford's mix 13 per word.
fn hash(members: &[Chunk]) -> u64 {
    let mix = |mut x: u64| {
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    };
    let word = |hash: u64, word: u64| mix(hash.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ word);
    members.iter().fold(0, |hash, chunk| word(word(hash, u64::from(chunk.at)), chunk.bits))
}
