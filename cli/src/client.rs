//! Connections to coordinators. Any one of a cluster's serves every request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::inference_client::InferenceClient;
use tonic::Code;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::commands::{CommandError, Failed, usage};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// While it is awaited a coordinator is probed this often, and given up when it does not answer in time.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Prompt log-probabilities of a long prompt are one message.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// The key itself; it has no flag, since others see the command lines of processes.
const API_KEY_VARIABLE: &str = "BATON_API_KEY";

/// Heading of these flags, which many commands have.
const HEADING: &str = "Connection";

/// Where the coordinators listen for clients.
#[derive(clap::Args, Default)]
pub(crate) struct Target {
    /// Coordinators' gRPC addresses, with commas between them; the first that answers is asked
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', default_value = "127.0.0.1:7401",
          env = "BATON_COORDINATOR", hide_env_values = true, help_heading = HEADING)]
    coordinator: Vec<String>,
    /// File with the API key [default: what BATON_API_KEY says]
    #[arg(long, value_name = "FILE",
          env = "BATON_API_KEY_FILE", hide_env_values = true, help_heading = HEADING)]
    api_key_file: Option<PathBuf>,
    /// Authorities that the coordinators' certificates must come from, as PEM; turns on TLS
    #[arg(long, value_name = "FILE",
          env = "BATON_CA", hide_env_values = true, help_heading = HEADING)]
    tls_ca: Option<PathBuf>,
    /// Certificate to show to coordinators that ask for one, as PEM
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"],
          env = "BATON_CLIENT_CERT", hide_env_values = true, help_heading = HEADING)]
    tls_cert: Option<PathBuf>,
    /// Private key of that certificate, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert",
          env = "BATON_CLIENT_KEY", hide_env_values = true, help_heading = HEADING)]
    tls_key: Option<PathBuf>,
}

/// A connection that shows the key with every request.
pub(crate) type Connection = InterceptedService<Channel, ApiKey>;

/// The `authorization` of every request, if there is one.
#[derive(Clone)]
pub(crate) struct ApiKey(Option<MetadataValue<Ascii>>);

impl Interceptor for ApiKey {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Target {
    /// The coordinators at `addresses`, with commas between them; on this machine, without keys.
    pub(crate) fn new(addresses: &str) -> Self {
        let coordinator = addresses.split(',').map(str::to_owned).collect();
        Self { coordinator, ..Self::default() }
    }

    /// All of them, in the order in which they are to be tried; never none.
    pub(crate) fn addresses(&self) -> &[String] {
        &self.coordinator
    }

    /// For looking at the cluster: the first coordinator that answers.
    pub(crate) async fn cluster(&self) -> Result<ClusterClient<Connection>, CommandError> {
        let mut silent = Vec::new();
        for address in &self.coordinator {
            match self.endpoint(address)?.connect().await {
                Ok(channel) => {
                    return Ok(ClusterClient::with_interceptor(channel, self.api_key()?));
                }
                Err(error) => silent.push(silence(address, &error)),
            }
        }
        Err(no_answer(&silent.join(", ")))
    }

    /// For text generation at one coordinator.
    pub(crate) async fn inference(
        &self,
        address: &str,
    ) -> Result<InferenceClient<Connection>, Failure> {
        let channel = self.endpoint(address).map_err(Failure::Final)?.connect().await;
        let channel =
            channel.map_err(|error| Failure::TryAnother(no_answer(&silence(address, &error))))?;
        let key = self.api_key().map_err(Failure::Final)?;
        let client = InferenceClient::with_interceptor(channel, key);
        Ok(client.max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn api_key(&self) -> Result<ApiKey, CommandError> {
        let key = match &self.api_key_file {
            Some(file) => read(file)?,
            None => std::env::var(API_KEY_VARIABLE).unwrap_or_default(),
        };
        if key.trim().is_empty() {
            return Ok(ApiKey(None));
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.trim())
            .parse()
            .map_err(|_| "the API key has characters that no key has")?;
        value.set_sensitive(true);
        Ok(ApiKey(Some(value)))
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, CommandError> {
        let host = address.strip_prefix("http://").unwrap_or(address);
        let (scheme, host) = match host.strip_prefix("https://") {
            Some(_) if self.tls_ca.is_none() => {
                return Err(format!("--coordinator {address:?} needs --tls-ca").into());
            }
            Some(host) => ("https", host),
            None => (if self.tls_ca.is_some() { "https" } else { "http" }, host),
        };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{host}"));
        // Without a port there would be another one than coordinators take.
        let endpoint = endpoint.ok().filter(|endpoint| endpoint.uri().port().is_some());
        let mut endpoint =
            endpoint.ok_or_else(|| usage(&format!("--coordinator {address:?} is no HOST:PORT")))?;
        if let Some(ca) = &self.tls_ca {
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
            if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) {
                tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls).map_err(|e| format!("TLS: {e}"))?;
        }
        Ok(endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT))
    }
}

/// Reads a file of text.
pub(crate) fn read(file: &Path) -> Result<String, CommandError> {
    std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()).into())
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
    is_broken(status) || status.code() == Code::Unavailable
}

/// Whether it is this end that says so: a status that came over the wire has no cause.
fn is_broken(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// The address, and the last cause of why nobody answers there.
fn silence(address: &str, error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    format!("{address} ({cause})")
}

fn no_answer(addresses: &str) -> CommandError {
    let advice = "is one running there? `baton up` starts one here, --coordinator or \
                  BATON_COORDINATOR names another one, `baton doctor` looks for what is wrong";
    Failed::with(Failed::UNREACHABLE, format!("no coordinator answers at {addresses}; {advice}"))
}

/// A status as one line for a person.
pub(crate) fn explain(status: &tonic::Status) -> CommandError {
    let message = match status.message() {
        "" => format!("the coordinator answers {:?}, without a reason", status.code()),
        message => message.to_owned(),
    };
    let broken = || {
        format!(
            "the connection to the coordinator broke: {message}; if it does so every time, that is \
             not the gRPC port (7401 by default; 7402 is for HTTP, 7400 for nodes), or it wants TLS \
             (--tls-ca)"
        )
    };
    match status.code() {
        _ if is_broken(status) => Failed::with(Failed::UNREACHABLE, broken()),
        Code::NotFound => Failed::with(Failed::NOT_FOUND, message),
        Code::Unavailable => Failed::with(Failed::UNREACHABLE, message),
        _ => message.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_from_its_file_and_goes_along() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("key");
        std::fs::write(&file, "baton-12\n").expect("writable");
        let target = Target { api_key_file: Some(file), ..Target::new("x:1") };
        let mut key = target.api_key().expect("it is there");
        let request = key.call(tonic::Request::new(())).expect("nothing is refused");
        assert_eq!(request.metadata().get("authorization").expect("it is sent"), "Bearer baton-12");
        assert!(!format!("{:?}", request.metadata()).contains("baton-12"), "it is no secret");
    }

    #[test]
    fn tls_needs_an_authority() {
        let target = Target::new("https://x:1");
        let error = target.endpoint("https://x:1").expect_err("no authority").to_string();
        assert_eq!(error, "--coordinator \"https://x:1\" needs --tls-ca");
        assert!(target.endpoint("x:1").is_ok() && target.endpoint("http://x:1").is_ok());
    }

    #[test]
    fn an_address_has_a_port() {
        let target = Target::new("x:1");
        for bad in ["x", "", "a b:1", "::1", "http://x", "x:port"] {
            assert!(target.endpoint(bad).is_err(), "{bad}");
        }
        assert!(target.endpoint("[::1]:7401").is_ok());
    }
}
