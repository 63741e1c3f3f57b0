//! What the commands that ask something of a node share.

use std::time::Duration;

use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::{ListNodesRequest, Node};

use super::CommandError;
use crate::client::{Connection, Target, explain};

/// Nodes report ten times a second, and at once when their role or draining changes.
const PAUSE: Duration = Duration::from_millis(20);
/// A node that is told something reports it sooner, or does not hear its coordinator.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which node, and of which cluster.
#[derive(clap::Args)]
pub(crate) struct OrderArgs {
    /// Name of the node
    pub(crate) node: String,
    /// Even if no decode node of its model is left
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) target: Target,
}

/// Waits until the node shows that it does what it was told.
pub(crate) async fn follow(
    client: &mut ClusterClient<Connection>,
    name: &str,
    goal: &str,
    done: impl Fn(&Node) -> bool,
) -> Result<Node, CommandError> {
    let waited = tokio::time::timeout(PATIENCE, wait_until(client, name, done)).await;
    let late = || format!("{name} was told, but has not {goal} in {} s", PATIENCE.as_secs());
    waited.map_err(|_| late())?
}

/// Waits until the node is as wanted, however long that takes.
pub(crate) async fn wait_until(
    client: &mut ClusterClient<Connection>,
    name: &str,
    done: impl Fn(&Node) -> bool,
) -> Result<Node, CommandError> {
    loop {
        let nodes = client.list_nodes(ListNodesRequest {}).await;
        let nodes = nodes.map_err(|status| explain(&status))?.into_inner().nodes;
        let node = nodes.into_iter().find(|node| node.id == name);
        let node = node.ok_or_else(|| format!("{name} left the cluster"))?;
        if done(&node) {
            return Ok(node);
        }
        tokio::time::sleep(PAUSE).await;
    }
}
