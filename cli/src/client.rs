//! Connections to coordinators. Any one of a cluster's serves every request.

use std::time::Duration;

use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::inference_client::InferenceClient;
use tonic::transport::{Channel, Endpoint};

use crate::commands::CommandError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Prompt log-probabilities of a long prompt are one message.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// Where the coordinators listen for clients.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// Coordinators' gRPC addresses; the first that answers is asked
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "BATON_COORDINATOR",
        value_delimiter = ',',
        default_value = "127.0.0.1:7401"
    )]
    coordinator: Vec<String>,
}

impl Target {
    /// The coordinators at `addresses`, with commas between them.
    pub(crate) fn new(addresses: &str) -> Self {
        Self { coordinator: addresses.split(',').map(str::to_owned).collect() }
    }

    /// All of them, in the order in which they are to be tried; never none.
    pub(crate) fn addresses(&self) -> &[String] {
        &self.coordinator
    }

    /// For looking at the cluster: the first coordinator that answers.
    pub(crate) async fn cluster(&self) -> Result<ClusterClient<Channel>, CommandError> {
        let mut silent = Vec::new();
        for address in &self.coordinator {
            match endpoint(address)?.connect().await {
                Ok(channel) => return Ok(ClusterClient::new(channel)),
                Err(_) => silent.push(address.as_str()),
            }
        }
        Err(no_answer(&silent.join(", ")))
    }
}

/// How a request failed at one coordinator.
pub(crate) enum Failure {
    /// Nothing came of it, and another coordinator may serve it.
    TryAnother(CommandError),
    /// It would fail at any, or a part of the answer is there already.
    Final(CommandError),
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let error = explain(&status);
        if is_lost(&status) { Self::TryAnother(error) } else { Self::Final(error) }
    }
}

/// Whether the coordinator that answered so is lost, is going down or has no nodes.
pub(crate) fn is_lost(status: &tonic::Status) -> bool {
    // A status that came over the wire has no cause at this end.
    let broken = std::error::Error::source(status).is_some();
    broken || status.code() == tonic::Code::Unavailable
}

/// For text generation at one coordinator.
pub(crate) async fn inference(address: &str) -> Result<InferenceClient<Channel>, Failure> {
    let channel = endpoint(address).map_err(Failure::Final)?.connect().await;
    let channel = channel.map_err(|_| Failure::TryAnother(no_answer(address)))?;
    Ok(InferenceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

fn endpoint(address: &str) -> Result<Endpoint, CommandError> {
    let host = address.strip_prefix("http://").unwrap_or(address);
    let endpoint = Endpoint::from_shared(format!("http://{host}"));
    let endpoint = endpoint.map_err(|_| format!("--coordinator {address:?} is no HOST:PORT"))?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT))
}

fn no_answer(addresses: &str) -> CommandError {
    format!("no coordinator answers at {addresses}; is one running? (`baton up` starts one)").into()
}

/// A status as one line for a person.
pub(crate) fn explain(status: &tonic::Status) -> CommandError {
    match status.message() {
        "" => format!("the coordinator answers {:?}, without a reason", status.code()).into(),
        message => message.into(),
    }
}
