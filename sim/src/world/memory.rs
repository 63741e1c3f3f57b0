//! The modelled KV memory, and the model that reads and writes it.
//!
//! The KV of a token is a hash of token, position, layer and, above the first layer, of all that
//! precedes. A piece (one layer of one block) keeps the running fold of its tokens' KV and how many
//! they are, so that a step costs the same however many tokens a block has. Every token depends on
//! all pieces of its sequence: one lost, swapped, stale or half-written block changes the output.

use baton_proto::ids::RequestId;

/// One layer of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Piece {
    fold: u64,
    filled: u32,
}

impl Piece {
    /// What a unit leaves in a piece that it has begun and not ended to write.
    pub(crate) const TORN: Self = Self { fold: 0x7042, filled: u32::MAX };

    /// As bytes, for checksums.
    pub(crate) fn bytes(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.fold.to_le_bytes());
        bytes[8..].copy_from_slice(&self.filled.to_le_bytes());
        bytes
    }

    fn write(&mut self, slot: usize, kv: u64) {
        let in_order = slot == 0 || self.filled as usize == slot;
        let before = if slot == 0 { 0 } else { self.fold };
        self.fold = mix(before, if in_order { kv } else { !kv });
        self.filled = slot as u32 + 1;
    }

    /// The fold of the first `tokens` tokens, or nonsense if not exactly these are here.
    fn read(&self, tokens: usize) -> u64 {
        if self.filled as usize == tokens { self.fold } else { mix(self.fold, 0xbad) }
    }
}

/// The KV memory of one node.
pub(crate) struct Memory {
    block_tokens: usize,
    blocks: usize,
    /// Layer by layer.
    pieces: Vec<Piece>,
}

impl Memory {
    /// Memory full of what an earlier process left there.
    pub(crate) fn new(layers: usize, blocks: usize, block_tokens: usize) -> Self {
        let left = |at: usize| Piece { fold: mix(at as u64, 1), filled: block_tokens as u32 };
        Self { block_tokens, blocks, pieces: (0..layers * blocks).map(left).collect() }
    }

    pub(crate) fn piece(&self, layer: usize, block: u32) -> Piece {
        self.pieces[self.place(layer, block)]
    }

    pub(crate) fn set(&mut self, layer: usize, block: u32, piece: Piece) {
        let place = self.place(layer, block);
        self.pieces[place] = piece;
    }

    fn place(&self, layer: usize, block: u32) -> usize {
        layer * self.blocks + block as usize
    }

    /// One layer of the model: writes the KV of the rows from position `start` on, and lets each
    /// see all that lies in `blocks` up to itself.
    pub(crate) fn attend(&mut self, layer: usize, blocks: &[u32], start: usize, rows: &mut [u64]) {
        let size = self.block_tokens;
        let whole = |block: &u32| self.pieces[self.place(layer, *block)].read(size);
        let mut before = blocks[..start / size].iter().map(whole).fold(0, mix);
        for (row, position) in rows.iter_mut().zip(start..) {
            let (slot, block) = (position % size, blocks[position / size]);
            let place = self.place(layer, block);
            let piece = &mut self.pieces[place];
            piece.write(slot, key_value(*row, layer));
            let seen = mix(before, piece.read(slot + 1));
            if slot + 1 == size {
                before = seen;
            }
            *row = mix(*row, seen);
        }
    }
}

/// A row before the first layer.
pub(crate) fn embed(token: u32, position: usize) -> u64 {
    mix(u64::from(token), position as u64)
}

/// The token after a row of the last layer.
pub(crate) fn next_token(row: u64, vocab: u32) -> u32 {
    (mix(row, 0x70c) % u64::from(vocab)) as u32
}

fn key_value(row: u64, layer: usize) -> u64 {
    mix(row, 0x5eed + layer as u64)
}

/// What the model says to a sequence, computed without blocks, nodes or a cluster.
pub(crate) struct Oracle {
    block_tokens: usize,
    vocab: u32,
    position: usize,
    /// Of each layer: the fold of all full blocks, and that of the block that is not full.
    layers: Vec<(u64, u64)>,
    last_row: u64,
}

impl Oracle {
    pub(crate) fn new(layers: usize, block_tokens: usize, vocab: u32) -> Self {
        Self { block_tokens, vocab, position: 0, layers: vec![(0, 0); layers], last_row: 0 }
    }

    /// The sequence goes on with `token`.
    pub(crate) fn push(&mut self, token: u32) {
        let mut row = embed(token, self.position);
        self.position += 1;
        let block_ends = self.position.is_multiple_of(self.block_tokens);
        for (layer, (full, partial)) in self.layers.iter_mut().enumerate() {
            *partial = mix(*partial, key_value(row, layer));
            let seen = mix(*full, *partial);
            if block_ends {
                (*full, *partial) = (seen, 0);
            }
            row = mix(row, seen);
        }
        self.last_row = row;
    }

    /// The hidden state of the last token.
    pub(crate) fn hidden(&self) -> [f32; HIDDEN_SIZE] {
        hidden(self.last_row)
    }

    /// What comes next.
    pub(crate) fn next(&self) -> u32 {
        next_token(self.last_row, self.vocab)
    }
}

/// Elements of a hidden state.
pub(crate) const HIDDEN_SIZE: usize = 2;

/// The hidden state of a token: small whole numbers, so that sums of them are exact.
pub(crate) fn hidden(row: u64) -> [f32; HIDDEN_SIZE] {
    [(row & 0xffff) as f32, (row >> 16 & 0xffff) as f32]
}

/// A request's tokens when nobody says which.
pub(crate) fn made_up_tokens(of: u64, count: usize, vocab: u32) -> impl Iterator<Item = u32> {
    (0..count as u64).map(move |at| (mix(of, at) % u64::from(vocab)) as u32)
}

/// A request's name.
pub(crate) fn request_id(client: usize, submission: u32) -> RequestId {
    RequestId((u128::from(submission) << 64) | (client as u128 + 1))
}

/// Not symmetric and not linear in its arguments (the finalizer of MurmurHash3).
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    z = (z ^ (z >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    z ^ (z >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: usize = 2;
    const SIZE: usize = 4;
    const VOCAB: u32 = u32::MAX;

    /// Computes `tokens` from position `start` on, `chunk` at a time; what comes next.
    fn compute(
        memory: &mut Memory,
        tokens: &[u32],
        start: usize,
        blocks: &[u32],
        chunk: usize,
    ) -> u32 {
        let mut last = 0;
        for from in (start..tokens.len()).step_by(chunk) {
            let part = tokens[from..].iter().take(chunk).zip(from..);
            let mut rows: Vec<u64> = part.map(|(&token, at)| embed(token, at)).collect();
            (0..LAYERS).for_each(|layer| memory.attend(layer, blocks, from, &mut rows));
            last = rows[rows.len() - 1];
        }
        next_token(last, VOCAB)
    }

    #[test]
    fn blocks_and_chunks_change_nothing_and_a_wrong_piece_changes_the_output() {
        let tokens: Vec<u32> = made_up_tokens(7, 14, VOCAB).collect();
        let mut oracle = Oracle::new(LAYERS, SIZE, VOCAB);
        tokens.iter().for_each(|&token| oracle.push(token));
        for (blocks, chunk) in [([0, 1, 2, 3], 14), ([7, 2, 5, 0], 1), ([3, 1, 4, 6], 5)] {
            let mut memory = Memory::new(LAYERS, 8, SIZE);
            assert_eq!(compute(&mut memory, &tokens, 0, &blocks, chunk), oracle.next());
            for (layer, at) in (0..LAYERS).flat_map(|layer| (0..3).map(move |at| (layer, at))) {
                compute(&mut memory, &tokens[..13], 0, &blocks, chunk);
                let right = memory.piece(layer, blocks[at]);
                let other = memory.piece(layer, blocks[(at + 1) % 3]);
                for wrong in [Piece::TORN, other, Piece { filled: 3, ..right }, right] {
                    let last = memory.pieces.clone();
                    memory.set(layer, blocks[at], wrong);
                    let next = compute(&mut memory, &tokens, 13, &blocks, 1);
                    assert_eq!(next == oracle.next(), wrong == right, "{layer} {at} {wrong:?}");
                    memory.pieces = last;
                }
            }
        }
    }
}
