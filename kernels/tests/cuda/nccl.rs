//! Ranks of a communicator: processes, or devices of one process, as NCCL wants a device for each in
//! one process.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_kernels::cuda::testing::{self, TestDevice};
use baton_kernels::cuda::{
    Buffer, Communicator, Device, DeviceError, Event, Libraries, Nccl, NcclError, Stream,
};
use half::bf16;

use crate::child;

const ID: &str = "BATON_TEST_ID";
const RANK: &str = "BATON_TEST_RANK";
const RANKS: usize = 3;
const LEN: usize = 5000;
/// How long a name is given back to the library.
const RELEASE: Duration = Duration::from_secs(5);

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// The device and the libraries. None, with the reason printed, if one is missing.
fn nccl() -> Option<(&'static TestDevice, Libraries, Arc<Nccl>)> {
    let device = testing::test_device()?;
    let nccl = |libraries| Ok((libraries, Nccl::find(&device.paths)?));
    let found = Libraries::find(&device.paths).and_then(nccl);
    let (libraries, nccl) = found.map_err(|missing| println!("skipped: {missing}")).ok()?;
    Some((device, libraries, nccl))
}

/// The emulator's: a real one refuses several ranks of one device, and trusts addresses.
fn emulated_nccl() -> Option<(Libraries, Arc<Nccl>)> {
    let (device, libraries, nccl) = nccl()?;
    if device.emulator.is_none() {
        println!("skipped: only of the emulator's NCCL");
    }
    device.emulator.is_some().then_some((libraries, nccl))
}

fn start(test: &str, id: &str, rank: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("nccl::{test}"), "--nocapture"]);
    command.env(child::PART, "rank").env(ID, id).env(RANK, rank.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs a test as several ranks, all of which must succeed.
fn run_ranks(test: &str, ranks: usize) {
    let Some((_, nccl)) = emulated_nccl() else { return };
    let id: String = nccl.unique_id().unwrap().iter().map(|b| format!("{b:02x}")).collect();
    let children: Vec<_> = (0..ranks).map(|rank| start(test, &id, rank)).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
    }
}

/// The rank that this process is.
fn join(ranks: usize) -> (Stream, Communicator) {
    let id = std::env::var(ID).unwrap();
    let id = std::array::from_fn(|i| u8::from_str_radix(&id[2 * i..2 * i + 2], 16).unwrap());
    let rank = std::env::var(RANK).unwrap().parse().unwrap();
    let (device, _, nccl) = nccl().unwrap();
    let joined = Communicator::join(&nccl, &device.device, &id, (rank, ranks), deadline());
    (Stream::new(&device.device).unwrap(), joined.unwrap())
}

#[test]
fn ranks_send_gather_and_add_up() {
    if child::part().is_none() {
        return run_ranks("ranks_send_gather_and_add_up", RANKS);
    }
    let (stream, communicator) = join(RANKS);
    let rank = communicator.rank();
    // Around a ring: each sends to the next and receives from the one before.
    let own = stream.buffer(&vec![rank as u32 + 10; LEN]).unwrap();
    let received = Buffer::<u32>::new(stream.device(), LEN).unwrap();
    let (next, before) = ((rank + 1) % RANKS, (rank + RANKS - 1) % RANKS);
    let ring = |communicator: &Communicator| {
        communicator.send(&stream, own.all(), next)?;
        communicator.receive(&stream, received.all(), before)
    };
    communicator.group(ring).unwrap();
    let gathered = Buffer::<u32>::new(stream.device(), RANKS * LEN).unwrap();
    communicator.all_gather(&stream, own.all(), gathered.all()).unwrap();
    let values: Vec<_> = (0..LEN).map(|i| bf16::from_f32((i % 50 * (rank + 1)) as f32)).collect();
    let halves = stream.buffer(&values).unwrap();
    communicator.all_reduce(&stream, halves.all()).unwrap();
    let floats = stream.buffer(&[rank as f32 + 0.5; 7]).unwrap();
    communicator.all_reduce(&stream, floats.all()).unwrap();

    assert_eq!(stream.read(received.all()).unwrap(), vec![before as u32 + 10; LEN]);
    let expected: Vec<_> = (0..RANKS * LEN).map(|i| (i / LEN) as u32 + 10).collect();
    assert_eq!(stream.read(gathered.all()).unwrap(), expected);
    let sum = |i: usize| bf16::from_f32((i % 50 * 6) as f32);
    assert_eq!(stream.read(halves.all()).unwrap(), (0..LEN).map(sum).collect::<Vec<_>>());
    assert_eq!(stream.read(floats.all()).unwrap(), [4.5; 7]);
    communicator.check().unwrap();
    communicator.leave().unwrap();
}

/// Who waits for a rank that died finds out, and gets free by dropping the communicator.
#[test]
fn a_rank_that_dies_is_noticed() {
    if child::part().is_none() {
        return run_ranks("a_rank_that_dies_is_noticed", 2);
    }
    let (stream, communicator) = join(2);
    let data = stream.buffer(&[1.0_f32; LEN]).unwrap();
    communicator.all_reduce(&stream, data.all()).unwrap();
    stream.synchronize().unwrap();
    if communicator.rank() == 1 {
        std::process::exit(0);
    }
    communicator.receive(&stream, data.all(), 1).unwrap();
    let lost = loop {
        assert!(!stream.is_idle().unwrap(), "nobody sent anything");
        if let Err(error) = communicator.check() {
            break error;
        }
    };
    assert!(matches!(lost, NcclError::PeerLost { .. }), "{lost}");
    drop(communicator);
    stream.synchronize().unwrap();
}

/// A single rank, as a real device allows it too.
#[test]
fn a_rank_sends_to_itself() {
    let Some((device, _, nccl)) = nccl() else { return };
    let stream = Stream::new(&device.device).unwrap();
    let id = nccl.unique_id().unwrap();
    let alone = Communicator::join(&nccl, &device.device, &id, (0, 1), deadline()).unwrap();
    let from = stream.buffer(&(0..LEN as u64).collect::<Vec<_>>()).unwrap();
    let to = Buffer::<u64>::new(stream.device(), LEN).unwrap();
    let both = |alone: &Communicator| {
        alone.send(&stream, from.all(), 0)?;
        alone.receive(&stream, to.all(), 0)
    };
    alone.group(both).unwrap();
    alone.all_reduce(&stream, stream.buffer(&[1.0_f32]).unwrap().all()).unwrap();
    assert_eq!(stream.read(to.all()).unwrap(), stream.read(from.all()).unwrap());
    alone.leave().unwrap();
}

/// Neither by who joins, nor, once that is given up, by the library.
#[test]
fn ranks_that_do_not_come_are_not_waited_for() {
    let Some((device, _, nccl)) = nccl() else { return };
    let [joined, unused] = [(); 2].map(|()| nccl.unique_id().unwrap());
    let error = Communicator::join(&nccl, &device.device, &joined, (0, 2), Instant::now()).err();
    let error = error.expect("nobody else came");
    assert!(matches!(error, NcclError::TimedOut { .. }), "{error}");
    for id in [joined, unused] {
        assert_ne!(testing::nccl_awaits(&id), Some(false));
        // A real library need not hear of a name that somebody has joined by.
        Communicator::release(&nccl, &device.device, &id, Instant::now() + RELEASE);
        assert_ne!(testing::nccl_awaits(&id), Some(true));
    }
}

/// Several devices, real or the emulator's.
fn devices(ranks: usize) -> Option<(Vec<Stream>, Vec<Communicator>)> {
    let (_, libraries, nccl) = nccl()?;
    if Device::count(&libraries).unwrap() < ranks {
        println!("skipped: needs {ranks} devices");
        return None;
    }
    let devices: Vec<_> = (0..ranks).map(|i| Device::open(&libraries, i).unwrap()).collect();
    let communicators = Communicator::of_devices(&nccl, &devices).unwrap();
    Some((devices.iter().map(|device| Stream::new(device).unwrap()).collect(), communicators))
}

/// Two ranks on the emulator's devices of these numbers, as they found each other.
fn joined(ordinals: [usize; 2]) -> Option<[Result<(Stream, Communicator), NcclError>; 2]> {
    let (libraries, nccl) = emulated_nccl()?;
    let id = nccl.unique_id().unwrap();
    let join = |rank: usize| {
        let device = Device::open(&libraries, ordinals[rank]).unwrap();
        let own = Communicator::join(&nccl, &device, &id, (rank, 2), deadline())?;
        Ok((Stream::new(&device).unwrap(), own))
    };
    Some(std::thread::scope(|scope| {
        let threads = [0, 1].map(|rank| scope.spawn(move || join(rank)));
        threads.map(|thread| thread.join().unwrap())
    }))
}

#[test]
fn two_ranks_on_one_device_are_refused() {
    let Some(ranks) = joined([5, 5]) else { return };
    for rank in ranks {
        let error = rank.err().expect("as NCCL does");
        assert!(matches!(error, NcclError::Refused { .. }), "{error}");
    }
}

/// An abort does not wait for the call that it is to end, and nothing begins after it.
#[test]
fn a_call_that_hangs_is_ended_by_another_thread() {
    let Some([first, second]) = joined([6, 7]) else { return };
    let ((stream, own), (other_stream, other)) = (first.unwrap(), second.unwrap());
    let (data, room) = (stream.buffer(&[1_u8; LEN]), other_stream.buffer(&[0_u8; LEN]));
    let (data, room) = (data.unwrap(), room.unwrap());
    own.send(&stream, data.all(), 1).unwrap();
    other.receive(&other_stream, room.all(), 0).unwrap();
    assert_eq!(other_stream.read(room.all()).unwrap(), [1; LEN]);
    testing::break_nccl(stream.device(), None, true);
    let abort = own.aborter();
    std::thread::scope(|scope| {
        let call = scope.spawn(|| {
            let own = own;
            let error = own.send(&stream, data.all(), 1).unwrap_err();
            assert!(matches!(error, NcclError::PeerLost { .. }), "{error}");
            assert!(own.check().is_err() && own.send(&stream, data.all(), 1).is_err());
        });
        abort.abort();
        call.join().unwrap();
    });
    abort.abort();
    testing::break_nccl(stream.device(), None, false);
    stream.synchronize().unwrap();
}

/// Calls `work` for every rank at once, each on a thread of its own.
fn on_all<T: Send>(
    ranks: Vec<(&Stream, &mut Communicator)>,
    work: impl Fn(&Stream, &mut Communicator) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let start = |(stream, own)| scope.spawn(move || work(stream, own));
        let threads: Vec<_> = ranks.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A graph adds up what there is when it is replayed.
#[test]
fn devices_of_one_process_add_up_in_graphs_and_outside() {
    let Some((streams, mut communicators)) = devices(RANKS) else { return };
    let found = on_all(streams.iter().zip(&mut communicators).collect(), |stream, own| {
        let buffer = stream.buffer(&vec![own.rank() as f32 + 1.0; LEN]).unwrap();
        let add = |stream: &Stream| own.all_reduce(stream, buffer.all()).unwrap();
        add(stream);
        stream.synchronize().unwrap();
        let add = |stream: &Stream| {
            add(stream);
            Ok::<_, DeviceError>(())
        };
        let graph = stream.capture(add).unwrap();
        for _ in 0..2 {
            stream.replay(&graph).unwrap();
        }
        add(stream).unwrap();
        stream.read(buffer.all()).unwrap()
    });
    // 1 + 2 + 3, and three times as much after each of three more.
    assert!(found.iter().flatten().all(|value| *value == 6.0 * 27.0), "{:?}", found[0][0]);
}

#[test]
fn memory_of_another_device_is_refused() {
    if emulated_nccl().is_none() {
        return;
    }
    let Some((streams, mut communicators)) = devices(2) else { return };
    let elsewhere = streams[1].buffer(&[1.0_f32; 8]).unwrap();
    let error = communicators[0].all_reduce(&streams[0], elsewhere.all()).unwrap_err();
    assert!(matches!(error, NcclError::Refused { .. }), "{error}");
    communicators.clear();
}

/// Those who wait get free when all communicators are dropped.
#[test]
fn a_device_that_does_not_take_part_holds_up_nobody_forever() {
    let Some((streams, mut communicators)) = devices(2) else { return };
    let data = streams.iter().map(|stream| stream.buffer(&[1.0_f32; 8]).unwrap());
    let data: Vec<_> = data.collect();
    // The first sum also connects, for which the library waits for all ranks.
    on_all(streams.iter().zip(&mut communicators).collect(), |stream, own| {
        own.all_reduce(stream, data[own.rank()].all()).unwrap();
        stream.synchronize().unwrap();
    });
    communicators[0].all_reduce(&streams[0], data[0].all()).unwrap();
    let added = Event::new(streams[0].device()).unwrap();
    added.record(&streams[0]).unwrap();
    for _ in 0..10 {
        assert!(!added.is_done().unwrap());
    }
    communicators.clear();
    streams[0].synchronize().unwrap();
}
