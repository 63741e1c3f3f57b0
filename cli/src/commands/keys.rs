//! `baton keys`: API keys of clients.

use std::io::Write;

use baton_coordinator::front::door::keys::NewKey;
use baton_coordinator::front::door::scope::Scope;

use super::{CommandError, usage};
use crate::output::print;

/// Command line of `baton keys`.
#[derive(clap::Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key: prints it once, and its entry for the coordinators' file of keys
    New {
        /// Whose requests the key's are
        #[arg(long, value_name = "NAME")]
        tenant: String,
        /// Name of the key in logs and errors [default: the tenant's]
        #[arg(long)]
        name: Option<String>,
        /// What it may be used for: generate, view, operate; can be given several times
        #[arg(long = "scope", value_name = "SCOPE", default_value = "generate")]
        scopes: Vec<Scope>,
    },
}

/// Runs `baton keys`. The key is in no TOML that could be appended by mistake: it goes to standard
/// error, the entry to standard output.
pub(crate) fn run(command: &KeysCommand) -> Result<(), CommandError> {
    let KeysCommand::New { tenant, name, scopes } = command;
    let name = name.as_ref().unwrap_or(tenant);
    let key = NewKey::draw(name, tenant, scopes).map_err(|problem| usage(&problem))?;
    // A key that nobody saw must not get into the file.
    write!(
        std::io::stderr(),
        "The key, which is shown only now:\n\n    {}\n\nAppend this to the file that api_keys \
         names, and send the coordinators SIGHUP:\n\n",
        key.secret
    )?;
    Ok(print(&key.entry)?)
}
