//! What an identity's certificate says, whether or not it is good.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime};

use baton_proto::ids::NodeId;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::certified::certificates;
use crate::files::{self, FileError, NODE_CERT};
use crate::name::{self, Part, PeerError};

/// What a member's certificate says of it. Nothing is verified here; see
/// [`Identity::load`](crate::Identity::load).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFacts {
    /// The member.
    pub name: NodeId,
    /// What it may act as.
    pub part: Part,
    /// DNS names and IP addresses, the member's own among them.
    pub names: Vec<String>,
    /// When it begins to be valid.
    pub not_before: SystemTime,
    /// When it ends to be valid.
    pub not_after: SystemTime,
}

impl CertificateFacts {
    /// Reads `node.pem` in an identity's folder.
    pub fn read(dir: &Path) -> Result<Self, FileError> {
        let path = dir.join(NODE_CERT);
        let pem = files::read(&path)?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| FileError::new(&path, "no certificate in PEM form"))?;
        Self::of(&certificate).map_err(|error| FileError::new(&path, error))
    }

    /// What this certificate says.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, PeerError> {
        let (name, part) = name::peer(certificate)?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(certificate).map_err(|_| PeerError::Malformed)?;
        let Range { start: not_before, end: not_after } = times(&parsed);
        Ok(Self { name, part, names: names(&parsed), not_before, not_after })
    }
}

/// When the first certificate in this PEM expires; `None` if there is none.
#[must_use]
pub fn expires_at(pem: &str) -> Option<SystemTime> {
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).ok()?;
    Some(times(&parsed).end)
}

/// When all certificates of a PEM file are valid, whoever issued them: from the latest beginning to the
/// earliest end.
pub fn validity(path: &Path) -> Result<Range<SystemTime>, FileError> {
    let mut all: Option<Range<SystemTime>> = None;
    for certificate in certificates(path, &files::read(path)?)? {
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate)
            .map_err(|error| FileError::new(path, error))?;
        let one = times(&parsed);
        all = Some(match all {
            None => one,
            Some(all) => all.start.max(one.start)..all.end.min(one.end),
        });
    }
    Ok(all.expect("there is a certificate, or that was an error"))
}

fn times(certificate: &X509Certificate<'_>) -> Range<SystemTime> {
    let validity = certificate.validity();
    at(validity.not_before.timestamp())..at(validity.not_after.timestamp())
}

fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    let names = extension.iter().flat_map(|extension| &extension.value.general_names);
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
            _ => {
                let bytes: [u8; 16] = (*bytes).try_into().ok()?;
                Some(std::net::Ipv6Addr::from(bytes).to_string())
            }
        },
        _ => None,
    };
    names.filter_map(text).collect()
}

/// Seconds since 1970, which may be before.
fn at(seconds: i64) -> SystemTime {
    let away = Duration::from_secs(seconds.unsigned_abs());
    let moved = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(away)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(away)
    };
    moved.unwrap_or(SystemTime::UNIX_EPOCH)
}
