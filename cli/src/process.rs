//! One daemon as a child process: its log, its ready line, its end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;

use crate::signals;

/// After its output has closed a child has ended, or is about to.
const WAIT_PAUSE: Duration = Duration::from_millis(5);
/// Lines of a log that are shown when its daemon fails to start.
const TAIL_LINES: usize = 15;
/// Bytes of a log in which they are looked for.
const TAIL_BYTES: usize = 16 << 10;

/// How far a daemon is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Life {
    Starting,
    /// With its ready line.
    Ready(String),
    Ended(ExitStatus),
}

/// A running daemon. It is killed when this is dropped, and when this process ends in any way.
pub(crate) struct Process {
    pub(crate) name: String,
    pub(crate) log: PathBuf,
    pub(crate) pid: u32,
    child: Arc<Mutex<Child>>,
    life: watch::Receiver<Life>,
    keeper: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `command`; what it says goes to the file `log`, and its progress also to standard
    /// error if `progress` is set.
    pub(crate) fn start(
        name: &str,
        command: Command,
        log: &Path,
        progress: bool,
    ) -> io::Result<Self> {
        let file = File::create(log)?;
        let (started, result) = std::sync::mpsc::sync_channel(1);
        let (life, watched) = watch::channel(Life::Starting);
        let shown = progress.then(|| name.to_owned());
        // The child dies with the thread that started it, so that thread waits for it.
        let keeper =
            std::thread::Builder::new().name(format!("keep {name}")).spawn(move || match spawn(
                command,
            ) {
                Ok((child, output)) => {
                    let child = Arc::new(Mutex::new(child));
                    let _ = started.send(Ok(child.clone()));
                    keep(&child, output, file, shown.as_deref(), &life);
                }
                Err(error) => drop(started.send(Err(error))),
            })?;
        let child = result.recv().expect("the thread answers first of all")?;
        let pid = lock(&child).id();
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            pid,
            child,
            life: watched,
            keeper: Some(keeper),
        })
    }

    /// Waits until the daemon is ready or has ended.
    pub(crate) async fn started(&mut self) -> Life {
        let started = self.life.wait_for(|life| *life != Life::Starting).await;
        started.expect("the keeper says how its child ended").clone()
    }

    /// Waits until the daemon has ended.
    pub(crate) async fn ended(&self) -> ExitStatus {
        let mut life = self.life.clone();
        let ended = life.wait_for(|life| matches!(life, Life::Ended(_))).await;
        match &*ended.expect("the keeper says how its child ended") {
            Life::Ended(status) => *status,
            _ => unreachable!("waited for"),
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(*self.life.borrow(), Life::Ended(_))
    }

    /// Asks the daemon to end.
    pub(crate) fn terminate(&self) {
        if !self.has_ended() {
            signals::terminate(&lock(&self.child));
        }
    }

    /// Ends the daemon at once (SIGKILL).
    pub(crate) fn kill(&self) {
        // An error means that it has ended.
        let _ = lock(&self.child).kill();
    }

    /// The last lines of the log.
    pub(crate) fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let end = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL_BYTES)..]);
        let lines: Vec<&str> = end.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if let Some(keeper) = self.keeper.take() {
            // A panic of the keeper has been printed.
            let _ = keeper.join();
        }
    }
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(mut command: Command) -> io::Result<(Child, PipeReader)> {
    let (output, input) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    signals::die_with_this_thread(&mut command);
    let child = command.spawn()?;
    // `command` holds the pipe's other end; it is closed here.
    Ok((child, output))
}

fn keep(
    child: &Mutex<Child>,
    output: PipeReader,
    mut log: File,
    shown: Option<&str>,
    life: &watch::Sender<Life>,
) {
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        // A full disk must not stop the daemon.
        let _ = writeln!(log, "{line}");
        if let Some(name) = shown.filter(|_| line.starts_with("loading ")) {
            // Nor must a closed terminal.
            let _ = writeln!(io::stderr(), "{name}: {line}");
        }
        if line.starts_with("ready ") {
            life.send_if_modified(|life| {
                let first = *life == Life::Starting;
                if first {
                    *life = Life::Ready(line.into_owned());
                }
                first
            });
        }
    }
    // Locked only for moments, so that it can be killed meanwhile.
    let status = loop {
        match lock(child).try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(error) => unreachable!("a child can be waited for: {error}"),
        }
        std::thread::sleep(WAIT_PAUSE);
    };
    life.send_replace(Life::Ended(status));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn start(script: &str) -> (Process, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        let log = folder.path().join("log");
        (Process::start("test", shell, &log, false).expect("there is a shell"), folder)
    }

    #[tokio::test]
    async fn a_ready_line_is_found_and_a_dropped_process_is_gone() {
        let (mut process, _folder) = start("echo loading; echo ready a=1 >&2; exec sleep 1000");
        assert_eq!(process.started().await, Life::Ready("ready a=1".to_owned()));
        assert!(!process.has_ended());
        let proc = format!("/proc/{}", process.pid);
        assert!(Path::new(&proc).exists());
        drop(process);
        assert!(!Path::new(&proc).exists(), "killed and waited for");
    }

    #[tokio::test]
    async fn a_failed_start_shows_the_end_of_the_log() {
        let (mut process, _folder) = start("seq 1 100; echo cannot >&2; exit 3");
        let Life::Ended(status) = process.started().await else { panic!("it is never ready") };
        assert_eq!(status.code(), Some(3));
        let tail = process.log_tail();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("\n100\ncannot"), "{tail}");
    }

    #[tokio::test]
    async fn a_process_can_be_asked_to_end() {
        let (mut process, _folder) = start("exec sleep 1000");
        process.terminate();
        let status = process.ended().await;
        assert_eq!(status.signal(), Some(libc::SIGTERM));
        assert_eq!(process.started().await, Life::Ended(status));
        process.terminate();
        process.kill();
    }
}
