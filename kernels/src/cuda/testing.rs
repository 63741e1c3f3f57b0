//! A device for tests: a real one, or the emulator, which is built from `kernels/emulator` and
//! `kernels/cuda` with g++.
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "tests say why they are skipped")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use libloading::os::unix::{Library, Symbol};

use super::device::Device;
use super::error::DeviceError;
use super::library::{Libraries, LibraryPaths, Missing};
use super::nccl::UniqueId;
use super::stream::Stream;

mod build;
mod tile;

pub use build::{Emulator, build_emulator};
pub use tile::{MMA_TILE, WGMMA_TILE, mma_tile, wgmma_tile};

/// The variable that names the folder of an emulator to take instead of building one.
pub const EMULATOR_FOLDER: &str = "BATON_EMULATOR_FOLDER";

/// What tests run on.
pub struct TestDevice {
    /// The device.
    pub device: Arc<Device>,
    /// The library of the emulator, if it is one.
    pub emulator: Option<Library>,
    /// Where its libraries are.
    pub paths: LibraryPaths,
    /// Why there are no matrix products, if there are none.
    without_products: Option<Missing>,
}

/// The device of this process' tests: `BATON_TEST_DEVICE=real|emulator`, else a real one if there
/// is one, else the emulator. None, with the reason printed, if there is neither.
///
/// # Panics
/// If the one that was asked for does not work.
pub fn test_device() -> Option<&'static TestDevice> {
    static DEVICE: OnceLock<Option<TestDevice>> = OnceLock::new();
    DEVICE.get_or_init(open).as_ref()
}

/// A stream of the device of this process' tests. None, with the reason printed, if there is none.
///
/// # Panics
/// As [`test_device`].
pub fn test_stream() -> Option<Stream> {
    let device = test_device()?;
    Some(Stream::new(&device.device).expect("a stream of a device that works"))
}

/// The device of this process' tests, if it multiplies matrices. None, with the reason printed, if not.
///
/// # Panics
/// As [`test_device`].
pub fn products_device() -> Option<&'static TestDevice> {
    let test = test_device()?;
    if let Some(missing) = &test.without_products {
        println!("skipped: no matrix products: {missing}");
        return None;
    }
    Some(test)
}

/// A stream of it.
///
/// # Panics
/// As [`test_device`].
pub fn products_stream() -> Option<Stream> {
    products_device().and_then(|_| test_stream())
}

/// Runs a test in every order in which the emulator can run threads and copies, once on a real
/// device. Nothing if there is no device.
///
/// # Panics
/// As [`test_device`], and if the test panics.
pub fn schedules(test: impl Fn(&Stream)) {
    let Some(device) = test_device() else { return };
    let stream = test_stream().expect("there is a device");
    let Some(emulator) = &device.emulator else { return test(&stream) };
    for (order, early) in [(0, false), (1, true), (42, false)] {
        set_schedule(emulator, order, early);
        test(&stream);
    }
}

/// Runs a test with half a warp of each block as far behind as it may be, if there is the emulator.
///
/// # Panics
/// As [`schedules`].
pub fn stragglers(test: impl Fn(&Stream)) {
    let Some(emulator) = test_device().and_then(|device| device.emulator.as_ref()) else { return };
    set_schedule(emulator, 2, false);
    test(&test_stream().expect("there is a device"));
}

/// In which order kernels that this thread waits for run, and whether copies are early.
fn set_schedule(emulator: &Library, order: u32, early: bool) {
    // SAFETY: a function of the emulator with this signature.
    let set: Symbol<unsafe extern "C" fn(u32, i32)> =
        unsafe { emulator.get("emulator_set_schedule") }.expect("the emulator has it");
    // SAFETY: sets numbers of this thread.
    unsafe { set(order, early.into()) };
}

/// Whether a device has a kernel of this name.
#[must_use]
pub fn has_kernel(device: &Device, name: &str) -> bool {
    // Names are constants elsewhere; tests end soon.
    device.kernel(name.to_owned().leak()).is_ok()
}

/// Lets the emulator fail from now on, as when a device falls off the bus. Nothing on a real one.
///
/// # Panics
/// As [`test_device`].
pub fn lose_device() {
    if let Some(emulator) = test_device().and_then(|device| device.emulator.as_ref()) {
        // SAFETY: a function of the emulator with this signature.
        let lose: Symbol<unsafe extern "C" fn()> =
            unsafe { emulator.get("emulator_lose_device") }.expect("the emulator has it");
        // SAFETY: sets a number.
        unsafe { lose() };
    }
}

/// Lets everything that is queued on one of the emulator's devices fail, now and later. Nothing on
/// real ones.
///
/// # Panics
/// As [`test_device`].
pub fn fail_streams(device: &Device) {
    if let Some(emulator) = test_device().and_then(|device| device.emulator.as_ref()) {
        // SAFETY: a function of the emulator with this signature.
        let fail: Symbol<unsafe extern "C" fn(i32)> =
            unsafe { emulator.get("emulator_fail_streams") }.expect("the emulator has it");
        // SAFETY: marks streams.
        unsafe { fail(device.ordinal() as i32) };
    }
}

/// Runs a test of this binary, given by its whole name, once without each of its waits for events
/// that have not happened yet, until there are no more. How many they were, and those without which
/// it passes and prints the same lines with the word `outcome`. None on a real device.
///
/// # Panics
/// As [`test_device`], and if the test does not pass with all of its waits.
pub fn waits_not_missed(test: &str) -> Option<(usize, Vec<usize>)> {
    let device = test_device().filter(|device| device.emulator.is_some())?;
    let (mut not_missed, mut expected) = (Vec::new(), Vec::new());
    for ignored in 0.. {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.args(["--exact", test]).env(EMULATOR_FOLDER, &device.paths.folders[0]);
        command.env("BATON_TEST_DEVICE", "emulator");
        command.env("BATON_EMULATOR_IGNORE_WAIT", ignored.to_string());
        let output = command.arg("--nocapture").output().expect("it runs again");
        let [out, error] = [&output.stdout, &output.stderr].map(|s| String::from_utf8_lossy(s));
        let passed = output.status.success() && out.contains("1 passed");
        let results = out.lines().filter(|line| line.contains("outcome ")).map(str::to_owned);
        let results: Vec<_> = results.collect();
        if ignored == 0 {
            assert!(passed, "{test} with all of its waits:\n{out}{error}");
            expected = results;
        } else if !error.contains("emulator: wait") {
            return Some((ignored - 1, not_missed));
        } else if passed && results == expected {
            not_missed.push(ignored);
        }
    }
    unreachable!("a test ends")
}

/// Breaks the emulator's NCCL on one of its devices: only so many further messages that it sends or
/// receives ever end, all of them if none are named, and calls hang or do not. What is stuck is
/// freed by an abort. Nothing on real ones.
///
/// # Panics
/// As [`test_device`].
pub fn break_nccl(device: &Device, messages: Option<u16>, calls_hang: bool) {
    let Some(library) = emulated_nccl() else { return };
    // SAFETY: a function of the emulator with this signature.
    let fail: Symbol<unsafe extern "C" fn(i32, i32, i32)> =
        unsafe { library.get("emulator_break_nccl") }.expect("the emulator has it");
    let messages = messages.map_or(-1, i32::from);
    // SAFETY: sets numbers.
    unsafe { fail(device.ordinal() as i32, messages, calls_hang.into()) };
}

/// Whether the emulator's NCCL still waits for ranks of a name that this process made. None on real
/// devices.
///
/// # Panics
/// As [`test_device`].
#[must_use]
pub fn nccl_awaits(id: &UniqueId) -> Option<bool> {
    let library = emulated_nccl()?;
    // SAFETY: a function of the emulator with this signature.
    let awaits: Symbol<unsafe extern "C" fn(*const u8) -> i32> =
        unsafe { library.get("emulator_nccl_awaits") }.expect("the emulator has it");
    // SAFETY: reads the 128 bytes of a name.
    Some(unsafe { awaits(id.as_ptr()) } != 0)
}

/// The emulator's NCCL, if there is the emulator.
fn emulated_nccl() -> Option<Library> {
    let test = test_device().filter(|device| device.emulator.is_some())?;
    let library = test.paths.folders[0].join("libnccl.so.2");
    // SAFETY: the emulator's may be loaded at any time.
    let library = unsafe { Library::open(Some(&library), libloading::os::unix::RTLD_NOW) };
    Some(library.expect("it was built with the driver"))
}

fn open() -> Option<TestDevice> {
    let wanted = std::env::var("BATON_TEST_DEVICE").unwrap_or_default();
    if wanted != "emulator" {
        match open_real() {
            Ok(device) => return Some(device),
            Err(reason) => assert!(wanted != "real", "no device: {reason}"),
        }
    }
    let folder = std::env::var_os(EMULATOR_FOLDER).map(PathBuf::from);
    match folder.map_or_else(|| build_emulator(&Emulator::default()), Ok) {
        Ok(folder) => Some(open_emulator(folder)),
        Err(reason) => {
            assert!(wanted != "emulator", "no emulator: {reason}");
            eprintln!("skipped: there is no GPU, and no emulator: {reason}");
            None
        }
    }
}

fn open_real() -> Result<TestDevice, String> {
    let paths = LibraryPaths::from_environment();
    let libraries = Libraries::driver_alone(&paths).map_err(|missing| missing.to_string())?;
    let device = Device::open(&libraries, 0).map_err(|error: DeviceError| error.to_string())?;
    let without_products = Libraries::find(&paths).err();
    Ok(TestDevice { device, emulator: None, paths, without_products })
}

fn open_emulator(folder: PathBuf) -> TestDevice {
    let driver = folder.join("libcuda.so.1");
    // SAFETY: the emulator may be loaded at any time.
    let library = unsafe { Library::open(Some(&driver), libloading::os::unix::RTLD_NOW) };
    let paths = LibraryPaths { folders: vec![folder], environments: Vec::new() };
    let libraries = Libraries::find(&paths).unwrap_or_else(|missing| panic!("{missing}"));
    let device = Device::open(&libraries, 0).unwrap_or_else(|error| panic!("{error}"));
    let emulator = Some(library.expect("it was just built"));
    TestDevice { device, emulator, paths, without_products: None }
}
