//! A small growing set of small numbers.

/// A set of numbers. Those below 64 take no allocation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bits {
    low: u64,
    /// Numbers from 64.
    high: Vec<u64>,
}

impl Bits {
    fn word(&self, at: usize) -> u64 {
        if at == 0 { self.low } else { self.high.get(at - 1).copied().unwrap_or(0) }
    }

    /// Adds a number; false if it was there.
    pub(crate) fn insert(&mut self, number: usize) -> bool {
        let (at, bit) = (number / 64, 1 << (number % 64));
        let word = if at == 0 {
            &mut self.low
        } else {
            if self.high.len() < at {
                self.high.resize(at, 0);
            }
            &mut self.high[at - 1]
        };
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Removes a number; false if it was not there.
    pub(crate) fn remove(&mut self, number: usize) -> bool {
        let (at, bit) = (number / 64, 1 << (number % 64));
        let had = self.word(at) & bit != 0;
        if had {
            let word = if at == 0 { &mut self.low } else { &mut self.high[at - 1] };
            *word &= !bit;
        }
        had
    }

    /// Whether it is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.low == 0 && self.high.iter().all(|&word| word == 0)
    }

    /// Keeps what is in `other` too.
    pub(crate) fn intersect(&mut self, other: &Self) {
        self.low &= other.low;
        for (at, word) in self.high.iter_mut().enumerate() {
            *word &= other.word(at + 1);
        }
    }

    /// Calls `visit` with every number, ascending.
    pub(crate) fn each(&self, visit: impl FnMut(usize)) {
        self.difference(&Self::default(), visit);
    }

    /// Calls `visit` with every number that is not in `other`, ascending.
    pub(crate) fn difference(&self, other: &Self, mut visit: impl FnMut(usize)) {
        for at in 0..=self.high.len() {
            let mut word = self.word(at) & !other.word(at);
            while word != 0 {
                visit(64 * at + word.trailing_zeros() as usize);
                word &= word - 1;
            }
        }
    }
}
