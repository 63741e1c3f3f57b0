//! `baton role`: makes a node a prefill or a decode node while it runs.

use baton_proto::wire::v1::{Node, SetRoleRequest};

use super::CommandError;
use super::orders::{OrderArgs, follow};
use crate::client::explain;
use crate::output::print;

/// Command line of `baton role`.
#[derive(clap::Args)]
pub(crate) struct RoleArgs {
    #[command(flatten)]
    order: OrderArgs,
    /// What it is to be
    #[arg(value_parser = ["prefill", "decode"])]
    role: String,
}

/// Runs `baton role`: returns when the node says that it is what was asked for.
pub(crate) async fn run(args: RoleArgs) -> Result<(), CommandError> {
    let RoleArgs { order: OrderArgs { node, force, target }, role } = args;
    let mut client = target.cluster().await?;
    let request = SetRoleRequest { node: node.clone(), role: role.clone(), force };
    client.set_role(request).await.map_err(|status| explain(&status))?;
    let goal = format!("reported to be a {role} node");
    let after = follow(&mut client, &node, &goal, |node: &Node| node.role == role).await?;
    let work = match after.running + after.waiting {
        0 => String::new(),
        more => format!("; {more} sequences end as they began"),
    };
    Ok(print(&format!("{node} is a {role} node{work}\n"))?)
}
