//! A KV cache in the memory of a GPU (or of the emulator of one), read and written for transfers.
#![allow(clippy::unwrap_used, reason = "a test")]
#![expect(unsafe_code, reason = "begins copies")]

use std::process::Command;
use std::sync::Arc;

use baton_engine::channel::Part;
use baton_engine::staging::{Copies, DeviceKv, DeviceSlot};
use baton_engine::{MemoryLost, SharedKv};
use baton_kernels::cuda::{Device, Libraries, PieceShare, Stream, testing};

const LAYERS: usize = 3;
const BLOCKS: usize = 40;
/// Of the process that copies, and of the one that is copied from.
const OWN: PieceShare = PieceShare { kv_heads: 4, first_head: 1, heads: 2, head_bytes: 512 };
const WHOLE: PieceShare = PieceShare { kv_heads: 4, first_head: 0, heads: 4, head_bytes: 512 };
/// A handle of less than the driver's page would share what lies beside it.
const PAGE: usize = 4 << 20;

fn byte(seed: usize, at: usize) -> u8 {
    (at * 31 + at / 509 + seed * 77) as u8
}

/// A cache with contents.
fn cache(stream: &Stream, share: PieceShare, seed: usize) -> Arc<DeviceKv> {
    let bytes = LAYERS * BLOCKS * share.own_bytes();
    let contents: Vec<u8> = (0..bytes.max(PAGE)).map(|at| byte(seed, at)).collect();
    let pieces = Arc::new(stream.buffer(&contents).unwrap());
    Arc::new(DeviceKv { pieces, layers: LAYERS, blocks: BLOCKS, share })
}

fn contents(stream: &Stream, kv: &DeviceKv) -> Vec<u8> {
    stream.read(kv.pieces.all()).unwrap()
}

/// Where byte `i` of the cache's own piece is in a full piece.
fn place(share: PieceShare, i: usize) -> usize {
    let half = share.heads * share.head_bytes;
    i / half * share.kv_heads * share.head_bytes + share.first_head * share.head_bytes + i % half
}

fn slot(stream: &Stream) -> DeviceSlot {
    DeviceSlot::new(stream.device(), 8 * OWN.piece_bytes()).unwrap()
}

#[test]
fn pieces_go_out_in_their_canonical_form_and_come_back() {
    let Some(stream) = testing::test_stream() else { return };
    let (from, to) = (cache(&stream, OWN, 1), cache(&stream, OWN, 2));
    let (full, own) = (OWN.piece_bytes(), OWN.own_bytes());
    let mut copies = DeviceKv::copies(&[from]).unwrap();
    let (mut a, mut b) = (slot(&stream), slot(&stream));
    // SAFETY: the slots are looked at when both were waited for, and nobody writes to the cache.
    unsafe {
        copies.gather(2, &[39, 0, 7], &mut a).unwrap();
        copies.gather(0, &[5], &mut b).unwrap();
    }
    copies.wait().unwrap();
    copies.wait().unwrap();
    for (slot, layer, blocks) in [(&a, 2, &[39, 0, 7][..]), (&b, 0, &[5])] {
        for (at, block) in blocks.iter().enumerate() {
            let start = (layer * BLOCKS + block) * own;
            for i in 0..own {
                assert_eq!(slot.as_ref()[at * full + place(OWN, i)], byte(1, start + i));
            }
        }
    }
    // All but the second piece, to other places.
    let mut copies = DeviceKv::copies(std::slice::from_ref(&to)).unwrap();
    // SAFETY: as above.
    unsafe { copies.scatter(1, &mut a, &[(0, 3), (2, 38)]) }.unwrap();
    copies.wait().unwrap();
    let mut want: Vec<u8> = (0..contents(&stream, &to).len()).map(|at| byte(2, at)).collect();
    for (from, to) in [(39, 3), (7, 38)] {
        for i in 0..own {
            want[(BLOCKS + to) * own + i] = byte(1, (2 * BLOCKS + from) * own + i);
        }
    }
    assert!(contents(&stream, &to) == want);
}

/// What four devices have of a cache, two of one have in another.
#[test]
fn devices_exchange_whole_pieces_whatever_heads_they_have() {
    let Some(streams) = streams(4) else { return };
    let (from, to) = (shards(&streams[..4], 1), shards(&streams[..2], 9));
    let mut slot = DeviceSlot::new(streams[0].device(), 8 * WHOLE.piece_bytes()).unwrap();
    let blocks = [39, 0, 7];
    let mut out = DeviceKv::copies(&from).unwrap();
    // SAFETY: the slot is looked at when the copies were waited for, and nobody writes to caches.
    unsafe { out.gather(2, &blocks, &mut slot) }.unwrap();
    out.wait().unwrap();
    for (at, block) in blocks.iter().enumerate() {
        for (rank, kv) in from.iter().enumerate() {
            let (own, start) =
                (kv.share.own_bytes(), (2 * BLOCKS + *block as usize) * kv.share.own_bytes());
            for i in 0..own {
                let there = at * WHOLE.piece_bytes() + place(kv.share, i);
                assert_eq!(slot.as_ref()[there], byte(1 + rank, start + i));
            }
        }
    }
    let sent = slot.as_ref().to_vec();
    let mut into = DeviceKv::copies(&to).unwrap();
    // SAFETY: as above.
    unsafe { into.scatter(1, &mut slot, &[(0, 3), (2, 38)]) }.unwrap();
    into.wait().unwrap();
    for (rank, kv) in to.iter().enumerate() {
        let (own, found) = (kv.share.own_bytes(), contents(&streams[rank], kv));
        let mut want: Vec<u8> = (0..found.len()).map(|at| byte(9 + rank, at)).collect();
        for (at, block) in [(0, 3), (2, 38)] {
            for i in 0..own {
                want[(BLOCKS + block) * own + i] =
                    sent[at * WHOLE.piece_bytes() + place(kv.share, i)];
            }
        }
        assert!(found == want, "rank {rank}");
    }
}

/// A parcel's part for each pair of devices has the heads that both have, and nothing else is written.
#[test]
fn parcels_bring_every_head_to_the_device_that_has_it() {
    let Some(streams) = streams(4) else { return };
    for (senders, receivers) in [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2)] {
        let (from, to) = (shards(&streams[..senders], 1), shards(&streams[..receivers], 9));
        let sent = parts(&from, &to, &streams);
        let mut out = DeviceKv::copies(&from).unwrap();
        // SAFETY: the parcel is looked at when the copies were waited for; nobody writes to caches.
        unsafe { out.pack(2, &[39, 0, 7], &sent) }.unwrap();
        out.wait().unwrap();
        let mut arrived = parts(&to, &from, &streams);
        assert_eq!(sent.len(), arrived.len());
        for (sent, arrived) in sent.iter().zip(&mut arrived) {
            assert_eq!(sent.share, arrived.share);
            let bytes = streams[sent.device].read(sent.memory.all()).unwrap();
            arrived.memory = streams[arrived.device].buffer(&bytes).unwrap();
        }
        let mut into = DeviceKv::copies(&to).unwrap();
        // SAFETY: as above.
        unsafe { into.unpack(1, &arrived, &[3, 38, 5]) }.unwrap();
        into.wait().unwrap();
        for (rank, kv) in to.iter().enumerate() {
            let (own, found) = (kv.share.own_bytes(), contents(&streams[rank], kv));
            let mut want: Vec<u8> = (0..found.len()).map(|at| byte(9 + rank, at)).collect();
            for (block, to) in [(39, 3), (0, 38), (7, 5)] {
                for i in 0..own {
                    let theirs = in_shards(senders, 1, (2, block), place(kv.share, i));
                    want[(BLOCKS + to) * own + i] = theirs;
                }
            }
            assert!(found == want, "{senders} to {receivers} devices, rank {rank}");
        }
    }
}

/// One for each pair of devices that have heads in common, with room for three pieces.
fn parts(own: &[Arc<DeviceKv>], theirs: &[Arc<DeviceKv>], streams: &[Stream]) -> Vec<Part> {
    let mut parts = Vec::new();
    for (device, kv) in own.iter().enumerate() {
        for share in theirs.iter().filter_map(|theirs| kv.share.common(&theirs.share)) {
            let memory = streams[device].buffer(&vec![0xee; 3 * share.own_bytes()]).unwrap();
            parts.push(Part { device, share, memory });
        }
    }
    parts
}

/// A cache whose heads these devices share equally.
fn shards(streams: &[Stream], seed: usize) -> Vec<Arc<DeviceKv>> {
    let heads = WHOLE.kv_heads / streams.len();
    let share = |rank| PieceShare { first_head: rank * heads, heads, ..WHOLE };
    let shard = |(rank, stream)| cache(stream, share(rank), seed + rank);
    streams.iter().enumerate().map(shard).collect()
}

/// None, with the reason printed, if they are not all here: the driver alone is enough for one device.
fn libraries() -> Option<Libraries> {
    let found = Libraries::find(&testing::test_device()?.paths);
    found.map_err(|missing| println!("skipped: {missing}")).ok()
}

/// Of different devices.
fn streams(count: usize) -> Option<Vec<Stream>> {
    let libraries = libraries()?;
    if Device::count(&libraries).unwrap() < count {
        println!("skipped: needs {count} devices");
        return None;
    }
    let open = |ordinal| Stream::new(&Device::open(&libraries, ordinal).unwrap()).unwrap();
    Some((0..count).map(open).collect())
}

#[test]
fn a_slot_can_be_filled_again_at_once() {
    let Some(stream) = testing::test_stream() else { return };
    let kv = cache(&stream, WHOLE, 3);
    let mut copies = DeviceKv::copies(&[kv]).unwrap();
    let mut slots: Vec<_> = (0..9).map(|_| slot(&stream)).collect();
    for (n, slot) in slots.iter_mut().enumerate() {
        // SAFETY: as above.
        unsafe { copies.gather(n % LAYERS, &[n as u32, 20 + n as u32], slot) }.unwrap();
    }
    let bytes = WHOLE.piece_bytes();
    for (n, slot) in slots.iter().enumerate() {
        copies.wait().unwrap();
        for (at, block) in [n, 20 + n].into_iter().enumerate() {
            let start = (n % LAYERS * BLOCKS + block) * bytes;
            let piece = &slot.as_ref()[at * bytes..(at + 1) * bytes];
            assert!(piece.iter().enumerate().all(|(i, &found)| found == byte(3, start + i)));
        }
    }
}

#[test]
fn pieces_are_there_when_their_copy_was_waited_for() {
    let Some(stream) = testing::test_stream() else { return };
    let (kv, bytes) = (cache(&stream, WHOLE, 3), WHOLE.piece_bytes());
    let mut copies = DeviceKv::copies(std::slice::from_ref(&kv)).unwrap();
    let mut slots: Vec<_> = (0..6).map(|_| slot(&stream)).collect();
    for (n, slot) in slots.iter_mut().enumerate() {
        slot.as_mut().iter_mut().enumerate().for_each(|(at, to)| *to = byte(20 + n, at));
        // SAFETY: nobody else uses the cache, and the slots only when they were waited for.
        unsafe { copies.scatter(n % LAYERS, slot, &[(1, 30 + n as u32)]) }.unwrap();
    }
    for n in 0..slots.len() {
        copies.wait().unwrap();
        let start = (n % LAYERS * BLOCKS + 30 + n) * bytes;
        let piece = stream.read(kv.pieces.slice(start..start + bytes)).unwrap();
        assert!(piece.iter().enumerate().all(|(i, &found)| found == byte(20 + n, bytes + i)));
    }
}

#[test]
fn copies_need_all_of_their_waits() {
    let (out, into) =
        ("a_slot_can_be_filled_again_at_once", "pieces_are_there_when_their_copy_was_waited_for");
    for test in [out, into] {
        let Some((waits, not_missed)) = testing::waits_not_missed(test) else { return };
        println!("{test}: {waits} waits");
        assert!(
            waits > 5 && not_missed.is_empty(),
            "{test} does not miss {not_missed:?} of {waits}"
        );
    }
}

const DESCRIPTIONS: &str = "BATON_TEST_DESCRIPTIONS";
/// Of the first device of the caches that are copied from.
const THEIRS: usize = 4;

/// Another process copies its heads out of this one's caches, which have all of them: on one device,
/// or on several, as many as it has itself, more or fewer.
#[test]
fn a_process_copies_from_the_cache_of_another() {
    if let Ok(descriptions) = std::env::var(DESCRIPTIONS) {
        return descriptions.split(',').for_each(copy_from);
    }
    let Some(streams) = as_many_streams_as_there_are() else { return };
    let counts = [1, 2, 4].into_iter().filter(|count| *count <= streams.len());
    let caches: Vec<_> = counts.map(|count| shards(&streams[..count], THEIRS)).collect();
    let before: Vec<_> = caches.iter().map(|cache| contents_of(&streams, cache)).collect();
    let hex = |cache: &Vec<_>| -> String {
        let description = DeviceKv::describe(cache).unwrap().description;
        description.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_process_copies_from_the_cache_of_another", "--nocapture"]);
    let descriptions: Vec<_> = caches.iter().map(hex).collect();
    let output = command.env(DESCRIPTIONS, descriptions.join(",")).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    let after: Vec<_> = caches.iter().map(|cache| contents_of(&streams, cache)).collect();
    assert!(after == before, "nobody writes to it");
}

fn as_many_streams_as_there_are() -> Option<Vec<Stream>> {
    let libraries = libraries()?;
    streams(Device::count(&libraries).unwrap().min(4))
}

fn contents_of(streams: &[Stream], cache: &[Arc<DeviceKv>]) -> Vec<Vec<u8>> {
    streams.iter().zip(cache).map(|(stream, kv)| contents(stream, kv)).collect()
}

fn copy_from(hex: &str) {
    let byte_at = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    let description: Vec<u8> = (0..hex.len()).step_by(2).map(byte_at).collect();
    let streams = as_many_streams_as_there_are().unwrap();
    let some_heads = vec![cache(&streams[0], OWN, 50)];
    let mut copies = DeviceKv::copies(&some_heads).unwrap();
    refuses_what_does_not_fit(&mut *copies, &description);
    let shared = SharedKv { blocks: BLOCKS as u32, description };
    let counts = [1, 2, 4].into_iter().filter(|count| *count <= streams.len());
    let mut caches: Vec<_> = counts.map(|count| shards(&streams[..count], 60)).collect();
    caches.push(some_heads);
    for own in caches {
        let mut copies = DeviceKv::copies(&own).unwrap();
        let peer = copies.open(&shared).unwrap().expect("it is of this machine");
        assert!(copies.open(&shared).unwrap().is_some(), "as a second connection would");
        let before = contents_of(&streams, &own);
        // SAFETY: nobody reads or writes these caches meanwhile, and the blocks exist.
        assert_eq!(unsafe { copies.pull(&peer, 1, &[6, 39], &[0, 21]) }, Ok(true));
        // SAFETY: as above.
        assert_eq!(unsafe { copies.pull(&peer, 2, &[6], &[22]) }, Ok(true));
        copies.wait().unwrap();
        copies.wait().unwrap();
        for ((kv, mut want), found) in own.iter().zip(before).zip(contents_of(&streams, &own)) {
            for (layer, from, to) in [(1, 6, 0), (1, 39, 21), (2, 6, 22)] {
                for i in 0..kv.share.own_bytes() {
                    let at = (layer * BLOCKS + to) * kv.share.own_bytes() + i;
                    want[at] = theirs(shared.description.len(), layer, from, place(kv.share, i));
                }
            }
            assert!(found == want, "{:?} from {} bytes", kv.share, shared.description.len());
        }
    }
}

/// What byte `i` of a full piece is in the caches that are copied from, each of whose descriptions is
/// of another length.
fn theirs(description: usize, layer: usize, block: usize, i: usize) -> u8 {
    in_shards((description - 2 * NUMBER) / PART, THEIRS, (layer, block), i)
}

/// What byte `i` of a full piece is in a cache that so many devices share.
fn in_shards(ranks: usize, seed: usize, (layer, block): (usize, usize), i: usize) -> u8 {
    let (head, heads) = (i / WHOLE.head_bytes % WHOLE.kv_heads, WHOLE.kv_heads / ranks);
    let half = i / (WHOLE.kv_heads * WHOLE.head_bytes);
    let at = (half * heads + head % heads) * WHOLE.head_bytes + i % WHOLE.head_bytes;
    byte(seed + head / heads, (layer * BLOCKS + block) * (WHOLE.own_bytes() / ranks) + at)
}

/// A description: layers and bytes of a head, then for each device how many heads, and a handle.
const NUMBER: usize = 8;
const PART: usize = NUMBER + 64;

/// Descriptions are a peer's words.
fn refuses_what_does_not_fit(copies: &mut dyn Copies, description: &[u8]) {
    let mut open = |blocks, description: Vec<u8>| {
        let opened = copies.open(&SharedKv { blocks, description });
        opened.map(|opened| opened.is_some())
    };
    let refused: Result<bool, MemoryLost> = Ok(false);
    let numbers = 2 * NUMBER;
    assert_eq!(open(BLOCKS as u32, Vec::new()), refused);
    assert_eq!(open(BLOCKS as u32, description[1..].to_vec()), refused);
    assert_eq!(open(BLOCKS as u32, description[..numbers].to_vec()), refused, "no device");
    let part = &description[numbers..numbers + PART];
    let twice = [description, part].concat();
    assert_eq!(open(BLOCKS as u32, twice), refused, "more heads than there are");
    let many = [&description[..numbers], &part.repeat(17)].concat();
    assert_eq!(open(BLOCKS as u32, many), refused, "more devices than there may be");
    let too_many = (PAGE / LAYERS / (WHOLE.own_bytes() / 4)) as u32 + 1;
    assert_eq!(open(1 << 30, description.to_vec()), refused);
    // As much as the driver's pages hold is possible, beyond them nothing is.
    assert_eq!(open(too_many * 2, description.to_vec()), refused);
    for (at, value) in
        [(0, LAYERS as u64 + 1), (NUMBER, 1 << 60), (numbers, 8), (numbers, u64::MAX)]
    {
        let mut other = description.to_vec();
        other[at..at + NUMBER].copy_from_slice(&value.to_le_bytes());
        assert_eq!(open(BLOCKS as u32, other), refused, "{value} at {at}");
    }
    let mut nowhere = description.to_vec();
    for handle in nowhere[numbers..].chunks_mut(PART) {
        handle[NUMBER..].fill(9);
    }
    assert_eq!(open(BLOCKS as u32, nowhere), refused);
}
