//! The two things about processes that the standard library cannot say.
#![expect(unsafe_code, reason = "prctl and kill have no safe form in the standard library")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Makes the kernel kill the child when the calling *thread* ends, however that happens.
pub(crate) fn die_with_this_thread(command: &mut Command) {
    let parent = std::process::id();
    let before_exec = move || {
        // SAFETY: neither call touches memory, and both may be made between fork and exec.
        let (result, now) =
            unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        match result {
            0 if u32::try_from(now) == Ok(parent) => Ok(()),
            // The parent ended before the kernel knew what to do then.
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure neither allocates nor locks, nor does it rely on other threads.
    unsafe { command.pre_exec(before_exec) };
}

/// Asks the child to end (SIGTERM).
pub(crate) fn terminate(child: &Child) {
    let Ok(pid) = libc::pid_t::try_from(child.id()) else {
        return;
    };
    // SAFETY: sends a signal, nothing else. The child has not been waited for, as its owner
    // holds it, so the number cannot name another process; if it has ended, nothing happens.
    unsafe { libc::kill(pid, libc::SIGTERM) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let start = || {
            let mut command = Command::new("sleep");
            die_with_this_thread(command.arg("1000"));
            command.spawn().expect("there is sleep")
        };
        let mut child = std::thread::spawn(start).join().expect("no panic");
        let status = child.wait().expect("a child");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }
}
