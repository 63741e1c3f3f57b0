//! `baton cancel`: ends a request.

use baton_proto::wire::v1::CancelRequest;

use super::CommandError;
use crate::client::{Target, explain};
use crate::output::print;

/// Command line of `baton cancel`.
#[derive(clap::Args)]
pub(crate) struct CancelArgs {
    /// Its id, or the first digits of it
    request: String,
    #[command(flatten)]
    target: Target,
}

/// Runs `baton cancel`.
pub(crate) async fn run(args: CancelArgs) -> Result<(), CommandError> {
    let request = CancelRequest { request_id: args.request };
    let response = args.target.cluster().await?.cancel(request).await;
    let id = response.map_err(|status| explain(&status))?.into_inner().request_id;
    Ok(print(&format!("{id} is cancelled\n"))?)
}
