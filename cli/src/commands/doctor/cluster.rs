//! Other machines: who answers, and whether clocks agree.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, SystemTime};

use baton_proto::wire::v1::GetStatusRequest;

use super::report::Finding;
use crate::client::{Target, explain};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Certificates are backdated by an hour; logs and events are compared by people.
const NOTABLE_SKEW_MS: f64 = 2000.0;
const HARMFUL_SKEW_MS: f64 = 1_800_000.0;

/// The coordinator that clients here would ask.
pub(super) async fn coordinator(target: &Target) -> Finding {
    let what = "coordinator";
    let asked = async {
        let mut client = target.cluster().await?;
        let sent = unix_ms();
        let response = client.get_status(GetStatusRequest {}).await;
        let status = response.map_err(|status| explain(&status))?.into_inner();
        let skew = status.unix_ms as f64 - (sent + unix_ms()) / 2.0;
        Ok::<_, super::CommandError>((status, skew))
    };
    match asked.await {
        // Nothing has to run for this machine to be well.
        Err(error) => Finding::note(what, error.to_string(), "start one, or name it"),
        Ok((status, skew)) => {
            let finding = clock(skew);
            if finding.remedy.is_empty() {
                let words = if status.ready { "ready".to_owned() } else { status.reason };
                return Finding::fine(what, format!("{words}; {}", finding.found));
            }
            finding
        }
    }
}

fn unix_ms() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64() * 1e3
}

fn clock(skew_ms: f64) -> Finding {
    let what = "clock";
    let found = format!("the coordinator's is {:+.1} s from this one", skew_ms / 1e3);
    let remedy = "let both follow NTP (chrony or systemd-timesyncd)";
    match skew_ms.abs() {
        harmful if harmful > HARMFUL_SKEW_MS => Finding::problem(what, found, remedy),
        notable if notable > NOTABLE_SKEW_MS => Finding::note(what, found, remedy),
        _ => Finding::fine(what, "clocks agree"),
    }
}

/// Whether somebody listens at `address` (HOST:PORT).
pub(super) fn reachable(what: &str, address: &str) -> Finding {
    let resolved = match address.to_socket_addrs() {
        Ok(resolved) => resolved,
        Err(error) => {
            let remedy = "correct the name, or add it to DNS or /etc/hosts";
            return Finding::problem(what, format!("{address}: {error}"), remedy);
        }
    };
    let mut last = "it has no address".to_owned();
    for socket in resolved {
        match TcpStream::connect_timeout(&socket, CONNECT_TIMEOUT) {
            Ok(_) => return Finding::fine(what, format!("{address} answers")),
            Err(error) => last = error.to_string(),
        }
    }
    let remedy = "start the coordinator there, or let a firewall pass its cluster_listen port";
    Finding::problem(what, format!("{address}: {last}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_may_differ_a_little() {
        assert!(clock(-1500.0).remedy.is_empty());
        assert!(!clock(60_000.0).remedy.is_empty() && !clock(60_000.0).is_problem());
        assert!(clock(-7_200_000.0).is_problem());
    }

    #[test]
    fn who_listens_is_reachable() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        assert!(!reachable("x", &address).is_problem());
        drop(listener);
        assert!(reachable("x", &address).is_problem());
        assert!(reachable("x", "no port").is_problem());
    }
}
