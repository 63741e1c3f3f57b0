//! Memory, streams, events and graphs.

use baton_kernels::cuda::{Buffer, DeviceError, Event, Graph, Pinned, Stream, rms_norm, testing};
use half::bf16;

use crate::support::Random;

#[test]
fn copies_keep_what_they_copy() {
    let Some(stream) = testing::test_stream() else { return };
    let device = stream.device();
    let mut there = Pinned::<u32>::new(device, 100).unwrap();
    let numbers: Vec<u32> = (0..100).collect();
    there.as_mut_slice().unwrap().copy_from_slice(&numbers);
    let buffer = Buffer::<u32>::new(device, 100).unwrap();
    let second = Buffer::<u32>::new(device, 50).unwrap();
    stream.upload(&mut there, 0, buffer.all()).unwrap();
    stream.copy(buffer.slice(20..70), second.all()).unwrap();
    stream.zero(second.slice(0..10)).unwrap();
    let mut back = Pinned::<u32>::new(device, 60).unwrap();
    stream.download(second.all(), &mut back, 5).unwrap();
    let expected: Vec<u32> = [0; 15].into_iter().chain(30..70).chain([0; 5]).collect();
    assert_eq!(back.as_slice().unwrap(), expected);
}

/// The host may reuse its memory as soon as it is given it, also when another stream copied last.
#[test]
fn pinned_memory_waits_for_its_copies() {
    let Some(first) = testing::test_stream() else { return };
    let second = Stream::new(first.device()).unwrap();
    let mut pinned = Pinned::<u32>::new(first.device(), 1).unwrap();
    let buffer = Buffer::<u32>::new(first.device(), 2).unwrap();
    for (i, stream) in [&first, &second].into_iter().enumerate() {
        pinned.as_mut_slice().unwrap()[0] = i as u32 + 7;
        stream.upload(&mut pinned, 0, buffer.slice(i..i + 1)).unwrap();
    }
    pinned.as_mut_slice().unwrap()[0] = 0;
    assert_eq!(second.read(buffer.all()).unwrap(), [7, 8]);
}

/// Also when nobody looked at it between the copies of two streams.
#[test]
fn pinned_memory_waits_for_copies_of_all_streams() {
    let Some(first) = testing::test_stream() else { return };
    let second = Stream::new(first.device()).unwrap();
    let [mut from, mut to] = [(); 2].map(|()| Pinned::<u32>::new(first.device(), 2).unwrap());
    let [one, other] = [(); 2].map(|()| Buffer::<u32>::new(first.device(), 2).unwrap());
    from.as_mut_slice().unwrap().copy_from_slice(&[7, 8]);
    first.upload(&mut from, 0, one.all()).unwrap();
    second.upload(&mut from, 0, other.all()).unwrap();
    from.as_mut_slice().unwrap().fill(0);
    first.download(one.slice(0..1), &mut to, 0).unwrap();
    second.download(other.slice(1..2), &mut to, 1).unwrap();
    assert_eq!(to.as_slice().unwrap(), [7, 8]);
}

#[test]
fn pinned_memory_needs_all_of_its_waits() {
    let test = "device::pinned_memory_waits_for_copies_of_all_streams";
    let Some((waits, not_missed)) = testing::waits_not_missed(test) else { return };
    // Of both streams for the other one's copies, and of the host for the second one's.
    assert_eq!((waits, not_missed), (4, Vec::new()));
}

#[test]
fn streams_wait_for_events() {
    let Some(first) = testing::test_stream() else { return };
    let second = Stream::new(first.device()).unwrap();
    let event = Event::new(first.device()).unwrap();
    let x = first.buffer(&[bf16::ONE; 64]).unwrap();
    let y = Buffer::new(first.device(), 64).unwrap();
    rms_norm(&first, y.all(), x.all(), x.all(), 0.0).unwrap();
    event.record(&first).unwrap();
    second.wait(&event).unwrap();
    assert_eq!(second.read(y.all()).unwrap(), [bf16::ONE; 64]);
    assert!(event.is_done().unwrap() && first.is_idle().unwrap());
}

/// Streams that share no event need not run in order; the emulator makes sure that they do not.
#[test]
fn a_missing_event_shows_in_the_emulator() {
    let Some(first) = testing::test_stream() else { return };
    if testing::test_device().unwrap().emulator.is_none() {
        return;
    }
    let second = Stream::new(first.device()).unwrap();
    let x = first.buffer(&[bf16::ONE; 64]).unwrap();
    let y = Buffer::new(first.device(), 64).unwrap();
    rms_norm(&first, y.all(), x.all(), x.all(), 0.0).unwrap();
    let too_early = second.read(y.all()).unwrap();
    assert!(too_early.iter().all(|value| value.is_nan()), "{too_early:?}");
}

/// A graph holds what other streams do between two events, too.
#[test]
fn graphs_fork_and_join() {
    let Some(stream) = testing::test_stream() else { return };
    let other = Stream::new(stream.device()).unwrap();
    let [fork, join] = [(); 2].map(|()| Event::new(stream.device()).unwrap());
    let [x, y, z] = [(); 3].map(|()| stream.buffer(&[bf16::from_f32(3.0); 64]).unwrap());
    let ones = stream.buffer(&[bf16::ONE; 64]).unwrap();
    let both = |stream: &Stream| -> Result<(), DeviceError> {
        fork.record(stream)?;
        other.wait(&fork)?;
        rms_norm(&other, y.all(), x.all(), ones.all(), 0.0)?;
        join.record(&other)?;
        stream.wait(&join)?;
        stream.copy(y.all(), z.all())
    };
    let graph = stream.capture(both).unwrap();
    stream.replay(&graph).unwrap();
    assert_eq!(stream.read(z.all()).unwrap(), [bf16::ONE; 64]);
}

#[test]
fn polling_ends() {
    let Some(stream) = testing::test_stream() else { return };
    let buffer = Buffer::<u8>::new(stream.device(), 1 << 20).unwrap();
    let event = Event::timed(stream.device()).unwrap();
    let start = Event::timed(stream.device()).unwrap();
    start.record(&stream).unwrap();
    stream.zero(buffer.all()).unwrap();
    event.record(&stream).unwrap();
    while !event.is_done().unwrap() {
        std::thread::yield_now();
    }
    assert!(event.ms_since(&start).unwrap() >= 0.0);
}

/// A graph repeats its kernels on what their inputs hold by then.
#[test]
fn graphs_replay_on_new_contents() {
    let Some(stream) = testing::test_stream() else { return };
    let mut random = Random::new(3);
    let weight = stream.buffer(&[bf16::ONE; 256]).unwrap();
    let x = Buffer::<bf16>::new(stream.device(), 512).unwrap();
    let y = Buffer::<bf16>::new(stream.device(), 512).unwrap();
    let norm = |stream: &Stream| rms_norm(stream, y.all(), x.all(), weight.all(), 1e-6);
    let graph: Graph = stream.capture(norm).unwrap();
    for _ in 0..3 {
        stream.write(&random.bf16s(512), x.all()).unwrap();
        norm(&stream).unwrap();
        let expected = stream.read(y.all()).unwrap();
        stream.zero(y.all()).unwrap();
        stream.replay(&graph).unwrap();
        assert_eq!(stream.read(y.all()).unwrap(), expected);
    }
}

/// What a graph cannot hold is refused, and the stream goes on.
#[test]
fn captures_refuse_host_memory_and_waiting() {
    let Some(stream) = testing::test_stream() else { return };
    let buffer = Buffer::<u8>::new(stream.device(), 16).unwrap();
    let mut pinned = Pinned::<u8>::new(stream.device(), 16).unwrap();
    let result = stream.capture(|stream| stream.upload(&mut pinned, 0, buffer.all()));
    assert!(matches!(result.err(), Some(DeviceError::Refused { .. })));
    stream.zero(buffer.all()).unwrap();
    assert_eq!(stream.read(buffer.all()).unwrap(), [0; 16]);
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let Some(stream) = testing::test_stream() else { return };
    let before = stream.device().memory().unwrap();
    let error = Buffer::<u64>::new(stream.device(), 1 << 40).err();
    assert!(matches!(error, Some(DeviceError::OutOfMemory { .. })), "{error:?}");
    assert!(before.total_bytes >= before.free_bytes);
}
