//! Carries shares between coordinators: each dials those that it was told of, and both ends of a
//! call say what they have promised.

use std::time::Duration;

use baton_identity::{COORDINATOR_SERVER_NAME, Identity, Part, peer};
use baton_proto::InvalidMessage;
use baton_proto::ids::NodeId;
use baton_proto::share::Share;
use baton_proto::wire::peer as wire;
use tokio::sync::mpsc;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Response, Status};
use wire::peers_client::PeersClient;
use wire::peers_server::Peers;

use crate::core::Core;
use crate::driver::FromLink;

/// Largest message: a share of all nodes.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// How often promises are exchanged.
const INTERVAL: Duration = Duration::from_millis(50);
/// A coordinator that takes longer to answer has not.
const TIMEOUT: Duration = Duration::from_millis(500);
/// Pause before one that has not answered is asked again.
const PAUSE: Duration = Duration::from_millis(500);

/// Answers other coordinators.
pub(crate) struct Exchange {
    /// This coordinator.
    pub(crate) name: NodeId,
    /// What it has promised.
    pub(crate) core: Core,
    /// Who wants to know what others have.
    pub(crate) driver: mpsc::Sender<FromLink>,
}

#[tonic::async_trait]
impl Peers for Exchange {
    async fn exchange(
        &self,
        request: Request<wire::Share>,
    ) -> Result<Response<wire::Share>, Status> {
        let caller = coordinator_of(&request)?;
        let invalid = |e: InvalidMessage| Status::invalid_argument(e.to_string());
        let (from, share) = Share::from_wire(request.into_inner()).map_err(invalid)?;
        if from != caller {
            return Err(Status::permission_denied(format!("{caller} speaks for {from}")));
        }
        if from == self.name {
            let problem = format!("this is {from} itself, or another with its identity");
            return Err(Status::failed_precondition(problem));
        }
        let going = || Status::unavailable("the coordinator is shutting down");
        self.driver.send(FromLink::Share { from, share }).await.map_err(|_| going())?;
        let own = self.core.share().await.ok_or_else(going)?;
        Ok(Response::new(own.into_wire(&self.name)))
    }
}

fn coordinator_of<T>(request: &Request<T>) -> Result<NodeId, Status> {
    let certificates = request.peer_certs();
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| Status::unauthenticated("no certificate"))?;
    match peer(certificate) {
        Ok((name, Part::Coordinator)) => Ok(name),
        Ok((name, Part::Node)) => {
            Err(Status::permission_denied(format!("{name} is a node, not a coordinator")))
        }
        Err(error) => Err(Status::permission_denied(error.to_string())),
    }
}

/// Why a call of another coordinator gave nothing. The next one may.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("{}", .0.message())]
    Status(#[from] Status),
    #[error("no answer in time")]
    Timeout(#[from] tokio::time::error::Elapsed),
    #[error(transparent)]
    Protocol(#[from] InvalidMessage),
    #[error("this coordinator is shutting down")]
    Going,
}

/// One coordinator that this one was told of.
pub(crate) struct Caller {
    pub(crate) identity: Identity,
    pub(crate) core: Core,
    pub(crate) driver: mpsc::Sender<FromLink>,
}

impl Caller {
    /// Exchanges promises with the coordinator whose cluster address is `address`, for ever. Fails
    /// at once if `address` or the identity cannot be used.
    pub(crate) async fn keep_exchanging(
        self,
        address: String,
    ) -> Result<(), tonic::transport::Error> {
        let mut client = client(&self.identity, &address)?;
        let mut last = None;
        loop {
            let result = self.call(&mut client).await.map_err(|error| error.to_string());
            if result.is_err() {
                // The next connection is made with the certificate that counts by then.
                client = self::client(&self.identity, &address).unwrap_or(client);
            }
            let pause = if result.is_ok() { INTERVAL } else { PAUSE };
            // Each change is told once.
            if last.as_ref() != Some(&result) {
                match &result {
                    Ok(peer) => tracing::info!(%peer, address, "sharing promises"),
                    Err(error) => tracing::warn!(address, error, "no promises shared"),
                }
                last = Some(result);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One exchange over a connection of its own. Whether there was one.
    #[cfg(test)]
    pub(crate) async fn call_once(&self, address: &str) -> Result<NodeId, String> {
        let mut client = client(&self.identity, address).map_err(|e| e.to_string())?;
        self.call(&mut client).await.map_err(|e| e.to_string())
    }

    async fn call(&self, client: &mut PeersClient<Channel>) -> Result<NodeId, CallError> {
        let own = self.core.share().await.ok_or(CallError::Going)?;
        let own = own.into_wire(self.identity.node_id());
        let answer = tokio::time::timeout(TIMEOUT, client.exchange(own)).await??;
        let (from, share) = Share::from_wire(answer.into_inner())?;
        let message = FromLink::Share { from: from.clone(), share };
        self.driver.send(message).await.map_err(|_| CallError::Going)?;
        Ok(from)
    }
}

fn client(
    identity: &Identity,
    address: &str,
) -> Result<PeersClient<Channel>, tonic::transport::Error> {
    let own = tonic::transport::Identity::from_pem(identity.cert_pem(), identity.key_pem());
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(identity.ca_pem()))
        .identity(own)
        .domain_name(COORDINATOR_SERVER_NAME);
    let endpoint = Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?;
    let channel = endpoint.connect_timeout(TIMEOUT).tcp_nodelay(true).connect_lazy();
    Ok(PeersClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}
