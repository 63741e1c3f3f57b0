//! The decode daemon: a node that begins by taking the KV of prompts, or computing short ones
//! itself, and generating tokens.
//!
//! Any node does any work (see [`baton_node::worker`]); a coordinator may make it a prefill node
//! while it runs.

use std::process::ExitCode;

use baton_proto::ids::Role;

/// What the node is until it is told otherwise.
pub const ROLE: Role = Role::Decode;

/// Runs the daemon until it is told to stop; its exit status.
#[must_use]
pub fn run() -> ExitCode {
    baton_node::daemon::main(ROLE)
}
