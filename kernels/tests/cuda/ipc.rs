use baton_kernels::cuda::{Buffer, IpcHandle, SharedBuffer, Stream, testing};

use crate::child;

/// So large that the device's page holds nothing else.
const LEN: usize = 4 << 20;
const HANDLE: &str = "BATON_TEST_HANDLE";

fn hex(handle: &IpcHandle) -> String {
    handle.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> IpcHandle {
    std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
}

/// Another process reads what is there, and what it writes is there for the first.
#[test]
fn memory_is_shared_between_processes() {
    if child::part().is_some() {
        return read_and_write();
    }
    let Some(stream) = testing::test_stream() else { return };
    let buffer = Buffer::<u8>::new(stream.device(), LEN).unwrap();
    let contents: Vec<u8> = (0..LEN).map(|i| (i * 7 % 251) as u8).collect();
    stream.write(&contents, buffer.all()).unwrap();
    let handle = hex(&buffer.share().unwrap());
    child::expect("ipc::memory_is_shared_between_processes", "child", &[(HANDLE, &handle)]);
    let found = stream.read(buffer.all()).unwrap();
    assert_eq!(found[..LEN - 100], contents[..LEN - 100]);
    assert_eq!(found[LEN - 100..], [9; 100]);
}

fn read_and_write() {
    let stream = testing::test_stream().unwrap();
    let handle = from_hex(&std::env::var(HANDLE).unwrap());
    let shared = SharedBuffer::open(stream.device(), &handle).unwrap();
    assert!(shared.all().len() >= LEN);
    let there = shared.all().slice(0..LEN);
    // Copied on the device, not seen by the host.
    let own = Buffer::<u8>::new(stream.device(), LEN).unwrap();
    stream.copy(there, own.all()).unwrap();
    let found = stream.read(own.all()).unwrap();
    assert!(found.iter().enumerate().all(|(i, byte)| *byte == (i * 7 % 251) as u8));
    stream.write(&[9; 100], there.slice(LEN - 100..LEN)).unwrap();
}

#[test]
fn handles_of_nothing_are_refused() {
    let Some(stream) = testing::test_stream() else { return };
    assert!(SharedBuffer::open(stream.device(), &[7; 64]).is_err());
    // A process does not open its own.
    let buffer = Buffer::<u8>::new(stream.device(), LEN).unwrap();
    let own = SharedBuffer::open(&stream.device().clone(), &buffer.share().unwrap());
    assert!(own.is_err());
    let after = Stream::new(stream.device()).unwrap();
    after.zero(buffer.all()).unwrap();
    after.synchronize().unwrap();
}
