//! How a transfer reads and writes the pools of its two ends.

use bytes::Bytes;

/// The blocks of one sequence at the sending end.
pub trait BlockSource: Send + Sync + 'static {
    /// One layer of the sequence's block `ordinal`, exactly
    /// [`piece_bytes`](baton_proto::geometry::KvGeometry::piece_bytes) long. Asked only for pieces
    /// reported ready. The bytes are sent as they lie, so they must not change while the returned
    /// value lives.
    fn piece(&self, layer: u32, ordinal: u32) -> Bytes;
}

/// The blocks reserved for one sequence at the receiving end.
pub trait BlockSink: Send + Sync + 'static {
    /// Copies `bytes` to `offset` of one layer of the sequence's block `ordinal`. Within the piece
    /// and the granted blocks; never called for a piece that has landed, nor after the transfer
    /// has ended. What is written counts only once the transfer is complete.
    fn write(&self, layer: u32, ordinal: u32, offset: usize, bytes: &[u8]);
}
