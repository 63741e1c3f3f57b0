//! Connections to a coordinator.

use std::time::Duration;

use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::inference_client::InferenceClient;
use tonic::transport::{Channel, Endpoint};

use crate::commands::CommandError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Prompt log-probabilities of a long prompt are one message.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// Where the coordinator listens for clients.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// Coordinator's gRPC address
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "BATON_COORDINATOR",
        default_value = "127.0.0.1:7401"
    )]
    coordinator: String,
}

impl Target {
    /// The coordinator at `address`.
    pub(crate) fn new(address: impl Into<String>) -> Self {
        Self { coordinator: address.into() }
    }

    async fn channel(&self) -> Result<Channel, CommandError> {
        let address = &self.coordinator;
        let host = address.strip_prefix("http://").unwrap_or(address);
        let endpoint = Endpoint::from_shared(format!("http://{host}"))
            .map_err(|_| format!("--coordinator {address:?} is no HOST:PORT"))?
            .connect_timeout(CONNECT_TIMEOUT);
        endpoint.connect().await.map_err(|_| {
            format!("no coordinator answers at {address}; is one running? (`baton up` starts one)")
                .into()
        })
    }

    /// For text generation.
    pub(crate) async fn inference(&self) -> Result<InferenceClient<Channel>, CommandError> {
        let client = InferenceClient::new(self.channel().await?);
        Ok(client.max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    /// For looking at the cluster.
    pub(crate) async fn cluster(&self) -> Result<ClusterClient<Channel>, CommandError> {
        Ok(ClusterClient::new(self.channel().await?))
    }
}

/// A status as one line for a person.
pub(crate) fn explain(status: &tonic::Status) -> CommandError {
    match status.message() {
        "" => format!("the coordinator answers {:?}, without a reason", status.code()).into(),
        message => message.into(),
    }
}
