//! `baton certs`: the cluster's own certificate authority.

use std::path::PathBuf;

use baton_identity::{ClusterCa, Part};

use super::CommandError;
use crate::output::print;

/// Command line of `baton certs`.
#[derive(clap::Subcommand)]
pub(crate) enum CertsCommand {
    /// Make a certificate authority; keep its folder off the nodes
    Init {
        /// Folder to make
        #[arg(long, value_name = "DIR", default_value = "ca")]
        ca: PathBuf,
    },
    /// Issue the certificate of a coordinator or node, to be copied to its machine
    Issue {
        /// Name of the member: a-z, 0-9 and '-'
        name: String,
        /// The member is a coordinator, not a node
        #[arg(long)]
        coordinator: bool,
        /// Folder of the certificate authority
        #[arg(long, value_name = "DIR", default_value = "ca")]
        ca: PathBuf,
        /// Folder to make for the identity [default: the member's name]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Further DNS name or IP address of the member; can be given several times
        #[arg(long = "also", value_name = "NAME")]
        extra_names: Vec<String>,
    },
}

/// Runs `baton certs`.
pub(crate) fn run(command: &CertsCommand) -> Result<(), CommandError> {
    match command {
        CertsCommand::Init { ca } => {
            ClusterCa::create(ca)?;
            let made = ca.display();
            print(&format!("certificate authority made in {made}; keep ca.key secret\n"))?;
        }
        CertsCommand::Issue { name, coordinator, ca, out, extra_names } => {
            let part = if *coordinator { Part::Coordinator } else { Part::Node };
            let out = out.clone().unwrap_or_else(|| PathBuf::from(name));
            if out.join("node.key").exists() {
                let out = out.display();
                return Err(format!(
                    "{out} holds an identity; move it away, or give another --out"
                )
                .into());
            }
            let extra_names: Vec<&str> = extra_names.iter().map(String::as_str).collect();
            ClusterCa::open(ca)?.issue(part, &name.parse()?, &extra_names, &out)?;
            let out = out.display();
            print(&format!("identity of {name} written to {out}; pass it with --identity\n"))?;
        }
    }
    Ok(())
}
