//! `baton drain`: lets a node finish what it has and take nothing new, and undoes that.

use baton_proto::wire::v1::{DrainRequest, Node};

use super::CommandError;
use super::orders::{OrderArgs, follow, wait_until};
use crate::client::explain;
use crate::output::print;

/// Command line of `baton drain`.
#[derive(clap::Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    order: OrderArgs,
    /// Let it take work again
    #[arg(long)]
    undo: bool,
    /// Wait until it has no work left
    #[arg(long, conflicts_with = "undo")]
    wait: bool,
}

/// Runs `baton drain`: returns when the node says that it drains, or with `--wait` has drained.
pub(crate) async fn run(args: DrainArgs) -> Result<(), CommandError> {
    let DrainArgs { order: OrderArgs { node, force, target }, undo, wait } = args;
    let mut client = target.cluster().await?;
    let request = DrainRequest { node: node.clone(), undo, force };
    client.drain(request).await.map_err(|status| explain(&status))?;
    let goal = if undo { "reported that it takes work" } else { "reported that it drains" };
    let after = follow(&mut client, &node, goal, |node: &Node| node.draining != undo).await?;
    let text = if undo {
        format!("{node} takes work")
    } else if wait {
        wait_until(&mut client, &node, has_no_work).await?;
        format!("{node} takes nothing new and has no work")
    } else {
        let left = after.running + after.waiting;
        format!("{node} takes nothing new and has {left} sequences left")
    };
    Ok(print(&format!("{text}\n"))?)
}

fn has_no_work(node: &Node) -> bool {
    let blocks = node.kv_blocks.unwrap_or_default();
    node.running == 0 && node.waiting == 0 && blocks.active == 0 && blocks.leased == 0
}
