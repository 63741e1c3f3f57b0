//! `baton doctor`: looks for what is wrong with this machine, and says what to do about it.

mod certificates;
mod clients;
mod cluster;
mod gpu;
mod handshake;
mod machine;
mod report;

use std::path::{Path, PathBuf};

use baton_identity::{Identity, Part};
use baton_kvtransfer::Transport;
use baton_node::config::DeviceChoice;

use super::check::{self, Daemon};
use super::{CommandError, Failed};
use crate::client::Target;
use crate::output::{FormatArgs, print};
use gpu::Wanted;
use report::{Finding, as_json, as_text};

/// Command line of `baton doctor`.
#[derive(clap::Args)]
#[command(after_help = "With a configuration file, its certificates, addresses, folders and \
    coordinators are looked at as well. Ends with status 1 if anything is wrong; what is only worth \
    knowing does not count.")]
pub(crate) struct DoctorArgs {
    /// The TOML file of the daemon that is to run here
    file: Option<PathBuf>,
    /// Whose file it is [default: whose keys it has]
    #[arg(long, requires = "file")]
    daemon: Option<Daemon>,
    /// Folder of the identity, if a flag of the daemon names it, as in systemd's units
    #[arg(long, value_name = "DIR", requires = "file")]
    identity: Option<PathBuf>,
    /// Look for no GPU
    #[arg(long)]
    no_gpu: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: FormatArgs,
}

/// Runs `baton doctor`.
pub(crate) async fn run(args: DoctorArgs) -> Result<(), CommandError> {
    let mut findings = Vec::new();
    match &args.file {
        None => findings.push(cluster::coordinator(&args.target).await),
        Some(file) => match args.daemon.unwrap_or_else(|| check::guess(file)) {
            Daemon::Coordinator => coordinator(file, &args, &mut findings).await,
            Daemon::Node => node(file, &args, &mut findings).await,
        },
    }
    if args.file.is_none() && !args.no_gpu {
        findings.extend(gpu::findings(&[], Wanted::default()));
    }
    findings.extend(machine::findings());
    let text = if args.format.is_json() { as_json(&findings) } else { as_text(&findings) };
    print(&text)?;
    match findings.iter().filter(|finding| finding.is_problem()).count() {
        0 => Ok(()),
        some => {
            Err(Failed::with(1, format!("{some} of {} checks found a problem", findings.len())))
        }
    }
}

async fn coordinator(file: &Path, args: &DoctorArgs, findings: &mut Vec<Finding>) {
    let (config, folder) = match check::coordinator_config(file, args.identity.clone()) {
        Ok(read) => read,
        Err(error) => return findings.push(report::bad_file(file, &error)),
    };
    findings.push(report::good_file(file, "a coordinator's"));
    let identity = certificates::load(folder.as_deref(), Part::Coordinator, findings);
    findings.extend(clients::tls(config.tls.as_ref()));
    findings.extend(clients::keys(config.api_keys.as_ref()));
    let ports =
        [("cluster_listen", config.cluster_listen), ("grpc", config.grpc), ("http", config.http)];
    findings.extend(ports.map(|(key, address)| machine::tcp_port(key, address)));
    meet("peers", &config.peers, identity.as_ref(), findings).await;
    for (_, folder) in &config.models {
        findings.push(machine::readable(&folder.join("tokenizer.json")));
    }
}

async fn node(file: &Path, args: &DoctorArgs, findings: &mut Vec<Finding>) {
    let (config, folder) = match check::node_config(file, args.identity.clone()) {
        Ok(read) => read,
        Err(error) => return findings.push(report::bad_file(file, &error)),
    };
    findings.push(report::good_file(file, "a node's"));
    let identity = certificates::load(folder.as_deref(), Part::Node, findings);
    findings.push(machine::udp_port("kv_listen", config.kv_listen));
    findings.extend(config.metrics_listen.map(|at| machine::tcp_port("metrics_listen", at)));
    meet("coordinator", &config.coordinators, identity.as_ref(), findings).await;
    findings.push(cluster::coordinator(&args.target).await);
    if let Some(identity) = &identity {
        findings.extend(handshake::nodes(&args.target, identity).await);
    }
    findings.push(machine::readable(&config.model.join("config.json")));
    findings.extend(machine::weights(&config.model, config.load_format));
    if let Some(state) = &config.state {
        findings.push(machine::disk("state", state));
    }
    if !args.no_gpu && config.device != DeviceChoice::Cpu {
        let wanted = Wanted {
            gpu: matches!(config.device, DeviceChoice::Cuda(_)),
            nccl: matches!(&config.device, DeviceChoice::Cuda(several) if several.len() > 1)
                || config.kv_transports.contains(&Transport::Nccl),
        };
        findings.extend(gpu::findings(config.cuda_libraries.as_slice(), wanted));
    }
}

/// Coordinators at their cluster addresses. Without an identity it is only seen whether anybody listens.
async fn meet(
    what: &str,
    addresses: &[String],
    identity: Option<&Identity>,
    findings: &mut Vec<Finding>,
) {
    for address in addresses {
        findings.push(match identity {
            Some(identity) => handshake::coordinator(what, address, identity).await,
            None => cluster::reachable(what, address),
        });
    }
}
