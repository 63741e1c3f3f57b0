//! The cluster's certificate authority.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use baton_proto::ids::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};

use crate::files::{self, CA_CERT, CA_KEY, FileError, NODE_CERT, NODE_KEY};
use crate::name::{CLUSTER_DOMAIN, COORDINATOR_SERVER_NAME, Part};

const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_VALIDITY: Duration = DAY.saturating_mul(3652);
const MEMBER_VALIDITY: Duration = DAY.saturating_mul(365);
/// Clocks of a cluster may differ by this much.
const BACKDATED: Duration = Duration::from_secs(3600);

/// No certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// A file cannot be read or created.
    #[error(transparent)]
    File(#[from] FileError),
    /// An extra name is neither an IP address nor a DNS name outside the cluster's own domain.
    #[error("{0:?} is no IP address and no DNS name outside of .baton")]
    Name(String),
    /// The certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// Signs the certificates of one cluster's members. Its folder holds `ca.pem` and `ca.key`.
pub struct ClusterCa {
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl ClusterCa {
    /// Makes a new authority in `dir`, where there must be none.
    pub fn create(dir: &Path) -> Result<Self, IssueError> {
        files::create_private_dir(dir)?;
        let mut params = params_valid_for(CA_VALIDITY);
        params.distinguished_name.push(DnType::CommonName, "Baton cluster CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert_pem = params.self_signed(&key)?.pem();
        files::create(&dir.join(CA_CERT), 0o644, &cert_pem)?;
        files::create(&dir.join(CA_KEY), 0o600, &key.serialize_pem())?;
        let issuer = Issuer::new(params, key);
        Ok(Self { cert_pem, issuer })
    }

    /// Opens the authority that [`ClusterCa::create`] made in `dir`.
    pub fn open(dir: &Path) -> Result<Self, IssueError> {
        let (cert, key) = (dir.join(CA_CERT), dir.join(CA_KEY));
        let cert_pem = files::read(&cert)?;
        let key = KeyPair::from_pem(&files::read_key(&key)?)
            .map_err(|_| FileError::new(&key, "no private key in PEM form"))?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key)
            .map_err(|_| FileError::new(&cert, "no certificate in PEM form"))?;
        Ok(Self { cert_pem, issuer })
    }

    /// Issues a certificate for the member `name` and writes its identity to `dir`, where there
    /// must be none. `extra_names` are DNS names and IP addresses under which clients dial it.
    pub fn issue(
        &self,
        part: Part,
        name: &NodeId,
        extra_names: &[&str],
        dir: &Path,
    ) -> Result<(), IssueError> {
        let mut params = params_valid_for(MEMBER_VALIDITY);
        let dns_name = part.dns_name(name);
        params.distinguished_name.push(DnType::CommonName, dns_name.as_str());
        params.subject_alt_names = vec![SanType::DnsName(dns_name.try_into()?)];
        if part == Part::Coordinator {
            let shared = SanType::DnsName(COORDINATOR_SERVER_NAME.try_into()?);
            params.subject_alt_names.push(shared);
        }
        for extra in extra_names {
            params.subject_alt_names.push(extra_name(extra)?);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert = params.signed_by(&key, &self.issuer)?;
        files::create_private_dir(dir)?;
        // Nothing is written beside what is there already.
        for file in [NODE_KEY, NODE_CERT].map(|name| dir.join(name)) {
            if file.exists() {
                return Err(FileError::new(&file, "it is there already").into());
            }
        }
        // An identity beside its own authority shares the file; beside another one there can be none.
        match files::read(&dir.join(CA_CERT)) {
            Ok(present) if present == self.cert_pem => {}
            _ => files::create(&dir.join(CA_CERT), 0o644, &self.cert_pem)?,
        }
        files::create(&dir.join(NODE_KEY), 0o600, &key.serialize_pem())?;
        Ok(files::create(&dir.join(NODE_CERT), 0o644, &cert.pem())?)
    }
}

fn params_valid_for(validity: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + validity).into();
    params
}

fn extra_name(text: &str) -> Result<SanType, IssueError> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    let name = || IssueError::Name(text.to_owned());
    let lower = text.trim_end_matches('.').to_ascii_lowercase();
    let in_cluster = lower.rsplit('.').next() == Some(CLUSTER_DOMAIN);
    let valid = rustls::pki_types::DnsName::try_from(lower.as_str()).is_ok();
    if in_cluster || !valid {
        return Err(name());
    }
    Ok(SanType::DnsName(lower.try_into().map_err(|_| name())?))
}
