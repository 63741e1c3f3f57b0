//! The file of API keys.
//!
//! It holds SHA-256 digests. Slow hashes such as Argon2 are for secrets that people choose and others
//! guess; a key is 256 random bits, which nobody guesses however fast the hash is, and it is checked
//! at every request.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_proto::config::load_toml;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::quota::{Account, Limits};
use super::scope::Scope;

/// Most keys of a file: each is looked at for every request.
const MAX_KEYS: usize = 4096;
const MAX_NAME_BYTES: usize = 64;
/// A longer secret is none of ours.
const MAX_SECRET_BYTES: usize = 512;
/// What our own keys begin with, so that scanners of repositories can find those that leaked.
const PREFIX: &str = "baton-";

/// A file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read, or not as TOML.
    #[error(transparent)]
    File(#[from] baton_proto::config::ConfigError),
    /// It is not one of ours.
    #[error("{}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// The file, as written.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct KeysFile {
    keys: Vec<KeyEntry>,
    tenants: Vec<TenantEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: String,
    sha256: String,
    tenant: String,
    scopes: Option<Vec<Scope>>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u64>,
    max_in_flight: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantEntry {
    name: String,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u64>,
    max_in_flight: Option<u32>,
}

/// A key that is known, without its secret.
#[derive(Debug, PartialEq)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) tenant: Arc<str>,
    pub(crate) scopes: Vec<Scope>,
    /// Its own account and its tenant's.
    pub(crate) accounts: [(Account, Limits); 2],
    digest: [u8; 32],
}

/// All keys of a file.
#[derive(Debug, Default)]
pub(crate) struct KeyRing(Vec<Arc<Key>>);

impl KeyRing {
    /// Reads a file, which others must not be able to write.
    pub(crate) fn load(path: &Path) -> Result<Self, KeysError> {
        let wrong = |what| KeysError::Content { path: path.to_owned(), what };
        let file: KeysFile = load_toml(path)?;
        let mode = path.metadata().map_or(0, |file| file.mode());
        if mode & 0o002 != 0 {
            let what = format!("every user may write it (mode {:o}); make it 640", mode & 0o777);
            return Err(wrong(what));
        }
        Self::of(file).map_err(wrong)
    }

    fn of(file: KeysFile) -> Result<Self, String> {
        let KeysFile { keys, tenants } = file;
        if !(1..=MAX_KEYS).contains(&keys.len()) {
            return Err(format!("has {} keys; it must have 1 to {MAX_KEYS}", keys.len()));
        }
        if let Some(name) = twice(tenants.iter().map(|tenant| tenant.name.as_str())) {
            return Err(format!("tenant {name:?} is there twice"));
        }
        if let Some(name) = twice(keys.iter().map(|key| key.name.as_str())) {
            return Err(format!("key {name:?} is there twice"));
        }
        if let Some(idle) = tenants.iter().find(|t| keys.iter().all(|key| key.tenant != t.name)) {
            return Err(format!("tenant {:?} has no key", idle.name));
        }
        let ring: Vec<_> =
            keys.into_iter().map(|key| key.checked(&tenants)).collect::<Result<_, _>>()?;
        for (at, key) in ring.iter().enumerate() {
            if let Some(other) = ring[..at].iter().find(|other| other.digest == key.digest) {
                return Err(format!("keys {:?} and {:?} are the same", other.name, key.name));
            }
        }
        Ok(Self(ring))
    }

    /// The key of this secret. Takes as long for every secret of the same length: all keys are compared,
    /// and each to its end.
    pub(crate) fn find(&self, secret: &[u8]) -> Option<&Arc<Key>> {
        let digest = Sha256::digest(secret.get(..MAX_SECRET_BYTES).unwrap_or(secret));
        let mut found = None;
        for key in &self.0 {
            if key.digest.ct_eq(&digest).into() {
                found = Some(key);
            }
        }
        found.filter(|_| secret.len() <= MAX_SECRET_BYTES)
    }

    /// Whether a key or a tenant of it has this account.
    pub(crate) fn knows(&self, account: &Account) -> bool {
        self.0.iter().any(|key| key.accounts.iter().any(|(own, _)| own == account))
    }

    /// Number of keys.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl KeyEntry {
    fn checked(self, tenants: &[TenantEntry]) -> Result<Arc<Key>, String> {
        let Self {
            name,
            sha256,
            tenant,
            scopes,
            requests_per_minute,
            tokens_per_minute,
            max_in_flight,
        } = self;
        check_name("key", &name)?;
        check_name("tenant", &tenant)?;
        let digest = digest(&sha256)
            .ok_or_else(|| format!("sha256 of key {name:?} is not 64 hexadecimal digits"))?;
        let scopes = scopes.unwrap_or_else(|| vec![Scope::Generate]);
        if scopes.is_empty() {
            return Err(format!("key {name:?} has no scope"));
        }
        let own = Limits { requests_per_minute, tokens_per_minute, max_in_flight };
        check_limits("key", &name, own)?;
        let shared = tenants.iter().find(|entry| entry.name == tenant);
        let shared = shared.map_or_else(Limits::default, |entry| Limits {
            requests_per_minute: entry.requests_per_minute,
            tokens_per_minute: entry.tokens_per_minute,
            max_in_flight: entry.max_in_flight,
        });
        check_limits("tenant", &tenant, shared)?;
        let accounts =
            [(Account::Key(name.clone()), own), (Account::Tenant(tenant.clone()), shared)];
        Ok(Arc::new(Key { name, tenant: tenant.into(), scopes, accounts, digest }))
    }
}

fn twice<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = BTreeSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}

/// Names are shown in logs and errors.
fn check_name(what: &str, name: &str) -> Result<(), String> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(fine) {
        return Ok(());
    }
    Err(format!(
        "{what} {name:?} must be 1 to {MAX_NAME_BYTES} letters, digits, '-', '_', '.' or '@'"
    ))
}

fn check_limits(what: &str, name: &str, limits: Limits) -> Result<(), String> {
    let Limits { requests_per_minute, tokens_per_minute, max_in_flight } = limits;
    for (limit, value) in [
        ("requests_per_minute", requests_per_minute.map(u64::from)),
        ("tokens_per_minute", tokens_per_minute),
        ("max_in_flight", max_in_flight.map(u64::from)),
    ] {
        if value == Some(0) {
            return Err(format!("{limit} of {what} {name:?} is 0; it must be above 0"));
        }
    }
    Ok(())
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

/// A key that was just made: the secret for its user, and the entry for the file.
pub struct NewKey {
    /// The secret. It is nowhere else.
    pub secret: String,
    /// TOML to append to the file.
    pub entry: String,
}

impl NewKey {
    /// Makes a key at random. Refuses names that the file would refuse.
    pub fn draw(name: &str, tenant: &str, scopes: &[Scope]) -> Result<Self, String> {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|e| e.to_string())?;
        Self::of(random, name, tenant, scopes)
    }

    /// Makes a key of random bytes. Refuses names that the file would refuse.
    pub(crate) fn of(
        random: [u8; 32],
        name: &str,
        tenant: &str,
        scopes: &[Scope],
    ) -> Result<Self, String> {
        // First, since the name is often the tenant's.
        check_name("tenant", tenant)?;
        check_name("key", name)?;
        let secret = format!("{PREFIX}{}", hex(&random));
        let scopes = BTreeSet::from_iter(scopes);
        let scopes: Vec<_> = scopes.iter().map(|scope| format!("{:?}", scope.as_str())).collect();
        let entry = format!(
            "[[keys]]\nname = {name:?}\nsha256 = \"{}\"\ntenant = {tenant:?}\nscopes = [{}]\n",
            hex(&Sha256::digest(secret.as_bytes())),
            scopes.join(", ")
        );
        Ok(Self { secret, entry })
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::config::parse_toml;

    use super::*;

    fn read(text: &str) -> Result<KeyRing, String> {
        let file = parse_toml(text, Path::new("keys.toml")).map_err(|e| e.to_string())?;
        KeyRing::of(file)
    }

    fn new(byte: u8, name: &str) -> NewKey {
        NewKey::of([byte; 32], name, "acme", &[Scope::Generate, Scope::View]).unwrap()
    }

    #[test]
    fn a_new_key_opens_and_no_other_does() {
        let (ci, app) = (new(1, "ci"), new(2, "app"));
        let limits = "max_in_flight = 3\n[[tenants]]\nname = 'acme'\ntokens_per_minute = 9\n";
        let ring = read(&format!("{}{}{limits}", ci.entry, app.entry)).unwrap();
        let key = ring.find(app.secret.as_bytes()).unwrap();
        assert_eq!((&*key.name, &*key.tenant), ("app", "acme"));
        assert_eq!(key.scopes, [Scope::Generate, Scope::View]);
        assert_eq!(key.accounts[0].1.max_in_flight, Some(3));
        assert_eq!(key.accounts[1].1.tokens_per_minute, Some(9));
        assert_eq!(ring.find(ci.secret.as_bytes()).unwrap().name, "ci");
        let mut wrong = ci.secret.clone();
        wrong.pop();
        for secret in ["", "x", wrong.as_str(), &ci.secret.repeat(20), &format!("{} ", ci.secret)] {
            assert!(ring.find(secret.as_bytes()).is_none(), "{secret:?}");
        }
    }

    #[test]
    fn a_new_key_is_named_by_what_was_said() {
        let twice = [Scope::View, Scope::Generate, Scope::View];
        let key = NewKey::of([1; 32], "a", "acme", &twice).unwrap();
        assert!(key.entry.contains(r#"scopes = ["generate", "view"]"#), "{}", key.entry);
        let error = NewKey::of([1; 32], "", "", &[Scope::View]).err().unwrap();
        assert!(error.starts_with("tenant \"\" must be"), "{error}");
    }

    /// `printf foobar | sha256sum`
    #[test]
    fn digests_are_those_of_sha256sum() {
        let sha256 = "c3ab8ff13720e8ad9047dd39466b3c8974e592c2fa383d4a3960714caef0c4f2";
        let ring = read(&format!("[[keys]]\nname='a'\ntenant='t'\nsha256='{sha256}'")).unwrap();
        assert_eq!(ring.find(b"foobar").unwrap().scopes, [Scope::Generate]);
    }

    #[test]
    fn mistakes_are_named() {
        let entry = |change: &str| {
            let sha256 = format!("{:064}", 0);
            format!("[[keys]]\nname = 'a'\nsha256 = '{sha256}'\ntenant = 't'\n{change}")
        };
        let other = "[[keys]]\nname = 'b'\nsha256 = '";
        let cases = [
            (String::new(), "has 0 keys; it must have 1 to 4096"),
            (entry("scope = []"), "keys.toml:5:1: unknown key `scope`; did you mean `scopes`?"),
            (entry("scopes = []"), "key \"a\" has no scope"),
            (
                entry("scopes = ['admin']"),
                "keys.scopes is 'admin'; it must be one of `generate`, `view`, `operate`",
            ),
            (entry("max_in_flight = 0"), "max_in_flight of key \"a\" is 0; it must be above 0"),
            (entry("[[tenants]]\nname = 'u'"), "tenant \"u\" has no key"),
            (entry(&entry("")), "key \"a\" is there twice"),
            (
                entry(&format!("{other}{:064}'\ntenant = 't'", 0)),
                "keys \"a\" and \"b\" are the same",
            ),
            (entry(&format!("{other}12'\ntenant = 't'")), "sha256 of key \"b\" is not 64"),
            (
                entry(&format!("{other}{}'\ntenant = 't'", "+1".repeat(32))),
                "of key \"b\" is not 64",
            ),
            (entry(&format!("{other}{:064}'\ntenant = 'Ä'", 1)), "tenant \"Ä\" must be 1 to 64"),
        ];
        for (text, message) in cases {
            let error = read(&text).unwrap_err();
            assert!(error.contains(message), "{error:?} has no {message:?}");
        }
    }
}
