//! This machine: ports, limits, network, disk and files.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use baton_node::config::LoadFormat;

use super::report::Finding;
use crate::output::bytes;

/// What a KV transfer asks of the kernel for its socket's buffers.
const SOCKET_BUFFER: u64 = 8 << 20;
/// QUIC sends at least 1,200 bytes, beside IP and UDP headers.
const LEAST_MTU: u64 = 1280;
const LEAST_OPEN_FILES: u64 = 4096;
/// For pages that a GPU copies from.
const LEAST_LOCKED: u64 = 64 << 20;
const LEAST_DISK: u64 = 1 << 30;

/// What does not depend on a configuration.
pub(super) fn findings() -> Vec<Finding> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let limits = read("/proc/self/limits");
    let mut findings = vec![
        buffers("net.core.rmem_max", &read("/proc/sys/net/core/rmem_max")),
        buffers("net.core.wmem_max", &read("/proc/sys/net/core/wmem_max")),
        open_files(&limits),
        locked_memory(&limits),
        disk("temporary files", &std::env::temp_dir()),
    ];
    findings.extend(interfaces(Path::new("/sys/class/net")));
    findings
}

fn buffers(key: &str, text: &str) -> Finding {
    let Ok(size) = text.trim().parse::<u64>() else {
        return Finding::note(key, "unknown", "is /proc mounted?");
    };
    if size >= SOCKET_BUFFER {
        return Finding::fine(key, bytes(size));
    }
    let found = format!("{}; KV transfers over QUIC lose packets in bursts", bytes(size));
    Finding::note(key, found, format!("sysctl -w {key}={SOCKET_BUFFER}, and in /etc/sysctl.d"))
}

/// The soft limit of this name in /proc/self/limits; `None`: unlimited or unknown.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn open_files(limits: &str) -> Finding {
    match limit(limits, "Max open files") {
        Some(few) if few < LEAST_OPEN_FILES => {
            let remedy = "ulimit -n 65536, or LimitNOFILE=65536 in the unit";
            Finding::problem("open files", few.to_string(), remedy)
        }
        Some(many) => Finding::fine("open files", many.to_string()),
        None => Finding::fine("open files", "unlimited"),
    }
}

fn locked_memory(limits: &str) -> Finding {
    match limit(limits, "Max locked memory") {
        Some(little) if little < LEAST_LOCKED => {
            let found = format!("{} may be locked", bytes(little));
            let remedy = "for GPUs: LimitMEMLOCK=infinity in the unit";
            Finding::note("locked memory", found, remedy)
        }
        Some(enough) => Finding::fine("locked memory", bytes(enough)),
        None => Finding::fine("locked memory", "unlimited"),
    }
}

/// Interfaces that carry packets.
fn interfaces(folder: &Path) -> Vec<Finding> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    let read = |name: &std::ffi::OsStr, file: &str| {
        std::fs::read_to_string(folder.join(name).join(file)).unwrap_or_default()
    };
    names
        .iter()
        .filter(|name| read(name, "operstate").trim() == "up")
        .filter_map(|name| {
            let size: u64 = read(name, "mtu").trim().parse().ok()?;
            let (what, found) = (format!("MTU of {}", name.to_string_lossy()), size.to_string());
            let remedy = format!("QUIC needs {LEAST_MTU}: ip link set dev … mtu 1500");
            Some(match size {
                0..LEAST_MTU => Finding::problem(&what, found, remedy),
                _ => Finding::fine(what, found),
            })
        })
        .collect()
}

/// Whether a daemon could listen at `address`.
pub(super) fn tcp_port(key: &str, address: SocketAddr) -> Finding {
    port(key, address, TcpListener::bind(address).map(drop))
}

/// The same for UDP.
pub(super) fn udp_port(key: &str, address: SocketAddr) -> Finding {
    port(key, address, UdpSocket::bind(address).map(drop))
}

fn port(key: &str, address: SocketAddr, bound: std::io::Result<()>) -> Finding {
    let error = match bound {
        Ok(()) => return Finding::fine(key, format!("{address} is free")),
        Err(error) => error,
    };
    match error.kind() {
        // It may be the daemon itself.
        ErrorKind::AddrInUse => {
            let remedy = "fine if that is the daemon; else `ss -lntup` says who has it";
            Finding::note(key, format!("{address} is taken"), remedy)
        }
        ErrorKind::AddrNotAvailable => {
            let remedy = "it is no address of this machine: `ip addr` lists them";
            Finding::problem(key, format!("{address}: {error}"), remedy)
        }
        ErrorKind::PermissionDenied => {
            let remedy = "take a port from 1024 on, or give the unit CAP_NET_BIND_SERVICE";
            Finding::problem(key, format!("{address}: {error}"), remedy)
        }
        _ => Finding::problem(key, format!("{address}: {error}"), "take another address"),
    }
}

/// Space where `path` is, or will be made.
pub(super) fn disk(what: &str, path: &Path) -> Finding {
    let there = path.ancestors().find(|folder| folder.exists());
    let found = there.and_then(|folder| rustix::fs::statvfs(folder).ok());
    let Some(found) = found else {
        return Finding::problem(
            what,
            format!("{} cannot be looked at", path.display()),
            "make it",
        );
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let text = format!("{} free at {}", bytes(free), path.display());
    if free < LEAST_DISK {
        return Finding::problem(
            what,
            text,
            format!("make room: {} are wanted", bytes(LEAST_DISK)),
        );
    }
    Finding::fine(what, text)
}

/// Whether this user can read a file of the model.
pub(super) fn readable(file: &Path) -> Finding {
    match File::open(file) {
        Ok(_) => Finding::fine("model", format!("{} can be read", file.display())),
        Err(error) => {
            let remedy = "correct `model`, or let this user read it (chmod, chown)";
            Finding::problem("model", format!("{}: {error}", file.display()), remedy)
        }
    }
}

/// The model's weights, where there must be some.
pub(super) fn weights(folder: &Path, format: LoadFormat) -> Option<Finding> {
    if format == LoadFormat::Dummy {
        return None;
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path());
    let weights: Vec<_> =
        files.filter(|file| file.extension().is_some_and(|e| e == "safetensors")).collect();
    let bad = weights.iter().map(|file| readable(file)).find(Finding::is_problem);
    Some(bad.unwrap_or_else(|| match weights.len() {
        0 => Finding::problem(
            "model",
            format!("{} has no *.safetensors", folder.display()),
            "fetch the whole checkpoint",
        ),
        count => Finding::fine("model", format!("{count} *.safetensors can be read")),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units
Max open files            256                  524288               files
Max locked memory         unlimited            unlimited            bytes
";

    #[test]
    fn limits_are_the_soft_ones() {
        assert_eq!(limit(LIMITS, "Max open files"), Some(256));
        assert!(open_files(LIMITS).is_problem());
        assert_eq!(locked_memory(LIMITS), Finding::fine("locked memory", "unlimited"));
        let little = LIMITS.replace("unlimited", "8388608");
        assert_eq!(locked_memory(&little).verdict, Verdict::Note);
    }

    #[test]
    fn small_buffers_have_a_remedy() {
        let found = buffers("net.core.rmem_max", "212992\n");
        assert!(found.remedy.contains("sysctl -w net.core.rmem_max=8388608"), "{found:?}");
        assert_eq!(buffers("x", "8388608").verdict, Verdict::Fine);
    }

    #[test]
    fn only_interfaces_that_are_up_are_looked_at() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, state, mtu) in [("a", "up", "1500"), ("b", "down", "100"), ("c", "up", "1000")] {
            let interface = folder.path().join(name);
            std::fs::create_dir(&interface).expect("made");
            std::fs::write(interface.join("operstate"), state).expect("written");
            std::fs::write(interface.join("mtu"), mtu).expect("written");
        }
        let found = interfaces(folder.path());
        let verdicts: Vec<_> = found.iter().map(|f| (f.what.as_str(), f.is_problem())).collect();
        assert_eq!(verdicts, [("MTU of a", false), ("MTU of c", true)]);
    }

    #[test]
    fn a_port_that_is_taken_is_told_from_one_that_cannot_be() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = taken.local_addr().expect("bound");
        assert_eq!(tcp_port("grpc", address).verdict, Verdict::Note);
        let foreign: SocketAddr = "192.0.2.1:1".parse().expect("an address");
        assert!(udp_port("kv_listen", foreign).is_problem());
        assert!(!udp_port("kv_listen", "127.0.0.1:0".parse().expect("an address")).is_problem());
    }

    #[test]
    fn weights_are_wanted_unless_they_are_made_up() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(weights(folder.path(), LoadFormat::Dummy), None);
        let found = weights(folder.path(), LoadFormat::Safetensors);
        assert!(found.is_some_and(|finding| finding.is_problem()));
        std::fs::write(folder.path().join("model.safetensors"), "").expect("written");
        let found = weights(folder.path(), LoadFormat::Safetensors);
        assert!(found.is_some_and(|finding| !finding.is_problem()));
    }
}
